"""Progress on stderr: a bar on a terminal, nothing elsewhere. rich is imported when something has taken a while."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Self

from fusevm.cli.output import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Shorter work shows no bar.
_DELAY_S = 0.5


class Meter:
    """One bar at a time. Use as a context manager; `advance` or `set` as often as you like."""

    def __init__(self, *, is_shown: bool = True) -> None:
        self._is_shown = is_shown and is_terminal(sys.stderr)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._total: int | None = None
        self._done = 0
        self._shows_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def begin(self, title: str, total_bytes: int | None) -> None:
        """A new piece of work; an earlier bar is finished."""
        self.finish()
        self._title, self._total, self._done = title, total_bytes, 0
        self._shows_at = time.monotonic() + _DELAY_S

    def advance(self, count: int) -> None:
        """So many bytes more."""
        self.set(self._done + count)

    def set(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """So many bytes so far; the total when it has become known."""
        self._done = done_bytes
        self._total = total_bytes or self._total
        if not self._is_shown or time.monotonic() < self._shows_at:
            return
        if self._bar is None:
            self._start()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done_bytes, total=self._total)

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Hand pieces on and count them."""
        for piece in pieces:
            yield piece
            self.advance(len(piece))

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - 60 ms that short work does without
        from rich.progress import (  # noqa: PLC0415 - as above
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._title, total=self._total)
        self._bar.start()
