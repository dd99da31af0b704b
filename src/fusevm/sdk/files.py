"""Files and folders of a machine, synchronously."""

import contextlib
from collections.abc import Iterable, Iterator

from fusevm.sdk import core
from fusevm.sdk.channel import Channel
from fusevm.sdk.transport import ResponseStream
from fusevm.wire.guest import Extracted, FileEntry, FileWritten

#: A disk may be busy for long before the next bytes come.
SILENCE_S = 75.0
_Entries = list[FileEntry]


class Files:
    """`/v1/environments/{id}/files`. Paths are absolute."""

    def __init__(self, channel: Channel, env_id: str) -> None:
        self._channel = channel
        self._id = env_id

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The contents, or `length` bytes from `offset`. Raises FileNotFound, IsADirectory, BadRange."""
        with self.open(path, offset=offset, length=length) as response:
            return response.read()

    def open(self, path: str, *, offset: int = 0, length: int | None = None) -> ResponseStream:
        """The contents as a stream: `chunks()`, `size_bytes`, headers `x-fuse-mode` and `x-fuse-mtime-ms`."""
        return self._channel.stream(core.read_file(self._id, path, offset=offset, length=length), SILENCE_S)

    def write(
        self, path: str, data: bytes | Iterable[bytes], *, mode: str = "", user: str = "", mkdirs: bool = True
    ) -> FileWritten:
        """Replace a file atomically with bytes, or with pieces as they come. A cut-off transfer leaves nothing."""
        body = data if isinstance(data, bytes) else None
        call = core.write_file(self._id, path, body, mode=mode, user=user, mkdirs=mkdirs)
        return self._channel.get(call) if isinstance(data, bytes) else self._channel.put(call, data)

    def stat(self, path: str) -> FileEntry:
        """What is at a path; links are not followed. Raises FileNotFound."""
        return self._channel.get(core.stat_file(self._id, path))

    def list(self, path: str) -> _Entries:
        """The entries of a folder, by name."""
        return self._channel.get(core.list_files(self._id, path)).entries

    def mkdir(self, path: str, *, parents: bool = True, mode: str = "0755") -> FileEntry:
        """Make a folder."""
        return self._channel.get(core.make_directory(self._id, path, parents=parents, mode=mode))

    def move(self, path: str, to: str) -> FileEntry:
        """Rename."""
        return self._channel.get(core.move_file(self._id, path, to))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or a folder with its contents."""
        self._channel.call(core.delete_file(self._id, path, recursive=recursive))


class Archive:
    """`/v1/environments/{id}/archive`: whole folders as tar."""

    def __init__(self, channel: Channel, env_id: str) -> None:
        self._channel = channel
        self._id = env_id

    @contextlib.contextmanager
    def get(self, path: str) -> Iterator[Iterator[bytes]]:
        """The pieces of a tar of a file or folder, names relative to its parent."""
        with self._channel.stream(core.read_archive(self._id, path), SILENCE_S) as response:
            yield response.chunks()

    def put(self, path: str, tar: Iterable[bytes], *, user: str = "") -> Extracted:
        """Extract a tar (or gzip of one) below a folder that exists."""
        return self._channel.put(core.write_archive(self._id, path, user=user), tar)
