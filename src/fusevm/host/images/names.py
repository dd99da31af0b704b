"""The names of stored things: a small file that maps names to digests, changed as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from fusevm.host.images.workspace import brief_lock, write_durably


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    names: dict[str, str] = {}


class Names:
    """Names of one folder of digest-addressed things (`names.json`). Blocking: call it from a thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "names.json"

    def load(self) -> dict[str, str]:
        """Read all names. A missing file is an empty index; an unreadable one is an error, never an empty index."""
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        return msgspec.json.decode(raw, type=_Index).names

    def set(self, name: str, digest: str) -> None:
        """Point a name at a digest, durably. Idempotent."""
        self._change(lambda names: {**names, name: digest})

    def remove(self, *gone: str) -> None:
        """Forget names, durably. Idempotent."""
        self._change(lambda names: {name: digest for name, digest in names.items() if name not in gone})

    def _change(self, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        with brief_lock(self._root):
            before = self.load()
            after = change(before)
            if after != before:
                data = msgspec.json.format(msgspec.json.encode(_Index(names=dict(sorted(after.items())))))
                write_durably(self._path, data, mode=0o644, is_alone=True)
