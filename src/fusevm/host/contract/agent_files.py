"""The guest agent's files (docs/guest-protocol.md, section 4) as calls, for files/ops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

import msgspec

from fusevm.model.errors import AgentFailure
from fusevm.wire.contract import USER_ID
from fusevm.wire.decode import UNREADABLE
from fusevm.wire.errors import parse_error
from fusevm.wire.guest import FileEntry, FileList, FileMatches, FilePatched, FileWritten
from fusevm.wire.http1 import Body, Response, TooLong

T = TypeVar("T")

#: Some forty thousand entries of a folder, or as many matches as an agent gives with long lines.
_MAX_ANSWER_BYTES = 16 << 20
#: guest/internal/files/grep.go, maxMatches.
_MAX_MATCHES = 10_000
#: linux/limits.h, PATH_MAX and NAME_MAX; octal permissions.
_MAX_PATH, _MAX_NAME, _MAX_MODE = 4096, 255, 8
_MAX_ERROR_BYTES = 1 << 20
#: Between two pieces of a file that is read.
SILENCE_S = 60
_OWNER = f"{USER_ID}:{USER_ID}"


class Requests(Protocol):
    """Where requests to one agent go (`channel.AgentClient`)."""

    async def request(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: Body = None
    ) -> Response:
        """Send a request and return the head of its answer. Raises ConnectionError."""
        ...


class AgentFiles:
    """Calls about absolute paths. They raise what the agent answers, and ConnectionError."""

    def __init__(self, agent: Requests) -> None:
        self._agent = agent

    async def stat(self, path: str) -> FileEntry:
        """One entry; a link is itself."""
        return _checked(await self._operate("stat", FileEntry, path=path))

    async def entries(self, path: str, most: int) -> list[FileEntry]:
        """What is in a folder, by name; of more than `most` entries one more than that."""
        found = await self._operate("list", FileList, path=path)
        return [_checked(entry) for entry in found.entries[: most + 1]]

    async def make_folder(self, path: str) -> None:
        """Make a folder, and those above it, for the contract's user. Idempotent."""
        target = "/files?" + urlencode({"op": "mkdir", "user": _OWNER})
        await self._call("POST", target, msgspec.json.encode({"path": path, "parents": True}), FileEntry)

    async def move(self, path: str, to: str) -> None:
        """Rename; the folder above `to` must be there."""
        await self._operate("move", FileEntry, path=path, to=to)

    async def remove(self, path: str, *, is_recursive: bool) -> None:
        """Remove a file, an empty folder, or a whole one."""
        body = msgspec.json.encode({"path": path, "recursive": is_recursive})
        response = await self._agent.request("POST", "/files?op=remove", body=body)
        await _check(response)
        await response.read(_MAX_ERROR_BYTES)

    async def grep(self, path: str, **query: Any) -> FileMatches:
        """Search."""
        found = await self._operate("grep", FileMatches, path=path, **query)
        if len(found.matches) > _MAX_MATCHES:
            raise AgentFailure(problem=f"it has found {len(found.matches)} matches, of {_MAX_MATCHES} at most")
        return found

    async def write(self, path: str, content: bytes, mode: str) -> FileWritten:
        """Replace a file, whole or not at all. A new one belongs to the contract's user; others keep owner and mode."""
        return await self._call("PUT", await self._target(path, mode), content, FileWritten)

    async def write_at(self, path: str, offset: int, content: bytes, mode: str) -> FilePatched:
        """Write a part of a file in place."""
        return await self._call("PATCH", await self._target(path, mode, offset=str(offset)), content, FilePatched)

    async def open(self, path: str, *, offset: int = 0, length: int = 0) -> Reader:
        """Begin to read a file, or `length` bytes of it (0: to the end). Raises BadRange beyond its end."""
        headers = {}
        if offset or length:
            headers["range"] = f"bytes={offset}-{offset + length - 1 if length else ''}"
        response = await self._agent.request("GET", "/files?" + urlencode({"path": path}), headers=headers)
        await _check(response)
        return Reader(response)

    async def _target(self, path: str, mode: str, **query: str) -> str:
        """Where a file is written. An owner is named only for a new file: naming one would change that of an old."""
        query["path"] = path
        if mode:
            query["mode"] = mode
        if not await self.exists(path):
            query["user"] = _OWNER
        return "/files?" + urlencode(query)

    async def exists(self, path: str) -> bool:
        """Is there anything?"""
        response = await self._agent.request("POST", "/files?op=stat", body=msgspec.json.encode({"path": path}))
        content = await response.read(_MAX_ERROR_BYTES)
        if response.status == 200:
            return True
        error = parse_error(response.status, content)
        if error.reason in ("file_not_found", "not_a_directory"):
            return False
        raise error

    async def _operate(self, name: str, kind: type[T], **body: Any) -> T:
        return await self._call("POST", f"/files?op={name}", msgspec.json.encode(body), kind)

    async def _call(self, method: str, target: str, body: bytes, kind: type[T]) -> T:
        response = await self._agent.request(method, target, body=body)
        await _check(response)
        try:
            content = await response.read(_MAX_ANSWER_BYTES)
        except TooLong as e:
            problem = f"{method} /files was answered with more than {_MAX_ANSWER_BYTES >> 20} MiB; ask for less at once"
            raise AgentFailure(problem=problem) from e
        try:
            # The event loop stands still for it, which would be so in a thread, too: 60 ms at the limit above.
            return msgspec.json.decode(content, type=kind)
        except UNREADABLE as e:
            raise AgentFailure(problem=f"{method} /files was answered with something else ({e})") from e


class Reader:
    """A file that is being read. Read it to its end, or close it."""

    def __init__(self, response: Response) -> None:
        self._response = response
        #: None: of a file without a known size, such as those of /proc.
        self.size = _length(response.headers)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The content as it arrives. Raises ConnectionError, also for a guest that falls silent."""
        chunks = self._response.chunks()
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    chunk = await anext(chunks, b"")
            except TimeoutError as e:
                raise ConnectionResetError(f"the guest has sent nothing for {SILENCE_S} s") from e
            if not chunk:
                return
            yield chunk

    async def read(self, limit: int) -> bytes:
        """All of it. Raises ConnectionError beyond the limit."""
        return await self._response.read(limit)

    async def close(self) -> None:
        """Leave the rest unread."""
        await self._response.__aexit__(None, None, None)


def _checked(entry: FileEntry) -> FileEntry:
    """Raises AgentFailure for what is no entry of any file system."""
    if len(entry.path) > _MAX_PATH or len(entry.name) > _MAX_NAME or len(entry.mode) > _MAX_MODE:
        raise AgentFailure(problem=f"it has named a file that cannot be: {entry.path[:200]!r}")
    return entry


async def _check(response: Response) -> None:
    if not 200 <= response.status < 300:
        raise parse_error(response.status, await response.read(_MAX_ERROR_BYTES))


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None
