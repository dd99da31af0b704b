"""Masks known secret values in what comes out of a guest: events, errors, logs.

Pure. A value is known as it was given, as JSON writes it, and line by line; shorter ones than `LEAST` characters are
left alone, since they turn up everywhere. What a program encodes or makes up itself is not known and not masked.
"""

from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import replace

from fusevm.model.setup import AgentStatus, HealthStatus

MASK = b"***"
#: Characters.
LEAST = 8
#: Places that are looked at for the beginning of one value; a value that resembles itself has many.
_MAX_PLACES = 64


class Redactor:
    """Masks these values. Where they overlap, all of their characters are masked."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        forms = {form for value in values for form in _forms(value) if len(form) >= LEAST}
        self._needles = sorted((form.encode() for form in forms), key=len, reverse=True)

    def text(self, text: str) -> str:
        """A whole text."""
        if not self._needles:
            return text
        stream = self.stream()
        content = stream.feed(text.encode(errors="surrogatepass")) + stream.end()
        return content.decode(errors="surrogatepass")

    def stream(self, offset: int = 0) -> "RedactedStream":
        """A text that arrives in pieces, of which the first one begins at `offset`. What comes before may have been
        the beginning of a value: the rest of that line is left out."""
        return RedactedStream(self._needles, offset)

    def agent(self, status: AgentStatus) -> AgentStatus:
        """What a daemon's state says."""
        return replace(status, message=self.text(status.message))

    def health(self, status: HealthStatus) -> HealthStatus:
        """What a health check's verdict says."""
        return replace(status, message=self.text(status.message))


class RedactedStream:
    """Masks values across the boundaries of pieces: an end that may be the beginning of a value is held back."""

    def __init__(self, needles: list[bytes], offset: int) -> None:
        self._needles = needles
        self._held = b""
        self._is_within_line = bool(needles and offset)
        #: Offset in the original after what was passed on, and after what was fed.
        self.passed = self.fed = offset

    def feed(self, piece: bytes) -> bytes:
        """What may be passed on now."""
        self.fed += len(piece)
        if self._is_within_line:
            _, newline, piece = piece.partition(b"\n")
            self._is_within_line = not newline
        data = self._held + piece
        until = min((_beginning(data, needle) for needle in self._needles), default=len(data))
        return self._pass_on(data, until)

    def end(self) -> bytes:
        """The rest: nothing comes after it."""
        return self._pass_on(self._held, len(self._held))

    def _pass_on(self, data: bytes, until: int) -> bytes:
        """Everything up to `until`, and the values that begin before it."""
        content, at = bytearray(), 0
        for begin, end in sorted(self._found(data)):
            if begin >= max(at, until):
                break
            if begin >= at:
                content += data[at:begin] + MASK
            at = max(at, end)
        if at < until:
            content += data[at:until]
            at = until
        self._held = data[at:]
        self.passed = self.fed - len(self._held)
        return bytes(content)

    def _found(self, data: bytes) -> Iterator[tuple[int, int]]:
        for needle in self._needles:
            at = data.find(needle)
            while at >= 0:
                yield at, at + len(needle)
                at = data.find(needle, at + len(needle))


def _forms(value: str) -> set[str]:
    """How a value may be written. Line by line: terminals and prefixes of log lines come between lines."""
    return {value, msgspec.json.encode(value).decode()[1:-1], *(line.strip() for line in value.splitlines())}


def _beginning(data: bytes, needle: bytes) -> int:
    """Where the end of `data` begins that may be the beginning of a needle; its length: nowhere."""
    at = max(0, len(data) - len(needle) + 1)
    for _ in range(_MAX_PLACES):
        at = data.find(needle[:LEAST], at)
        if at < 0:
            break
        if needle.startswith(data[at:]):
            return at
        at += 1
    else:
        return at
    short = range(max(0, len(data) - LEAST + 1), len(data))
    return next((at for at in short if needle.startswith(data[at:])), len(data))
