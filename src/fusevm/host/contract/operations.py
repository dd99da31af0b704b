"""files/ops: the contract's one polymorphic request, as calls to the guest agent.

The agent is that of the running machine, or of the one that a stopped machine's disk is opened with (`host.visit`): one
program for both, so the answers are the same. What is read is passed on as it comes; what is written has come whole in
its JSON, within the route's limit.

Owns: the meaning of operations. Must not: know machines or HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal, TypeAlias

import msgspec

from fusevm.host.contract.agent_files import AgentFiles, Reader
from fusevm.host.contract.paths import relative, resolve, resolve_below
from fusevm.model.errors import BadField, BadRange, FileNotFound, FileTooLarge, Timeout
from fusevm.wire.contract import WORKSPACE, FileHit, FileItem, FilesAnswer, FilesOperation
from fusevm.wire.guest import FileEntry, FileMatches

#: A file that is edited is in memory, as it was and as it will be.
MAX_PATCH_BYTES = 16 << 20
#: A search of a whole disk in software emulation takes its time; what is read afterwards is not counted.
OPERATION_S = 300
#: Entries of one list.
MAX_ENTRIES = 20_000
#: Beyond what any file system of a guest can have.
_MAX_OFFSET = 1 << 56
#: Bytes that base64 turns into whole groups of four.
_GROUP = 3


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """An answer whose one field is a file's content, as it comes."""

    field: Literal["content", "content_base64"]
    reader: Reader

    async def chunks(self) -> AsyncIterator[bytes]:
        """The JSON body. Bytes that are no UTF-8 become U+FFFD in `content`, as in the contract."""
        yield f'{{"{self.field}":"'.encode()
        encode = _encode_text if self.field == "content" else _encode_bytes
        async for piece in encode(self.reader.chunks()):
            yield piece
        yield b'"}'


async def perform(files: AgentFiles, asked: FilesOperation) -> FilesAnswer | Reading:
    """Carry out one operation. Raises BadField, what the agent answers, Timeout for one that does not."""
    try:
        async with asyncio.timeout(OPERATION_S):
            return await OPERATIONS[asked.operation](files, asked)
    except TimeoutError as e:
        raise Timeout(what=f"the guest's answer to {asked.operation}", limit_s=OPERATION_S) from e


# -- reading ----------------------------------------------------------------------------------------------------------


async def _read_text(files: AgentFiles, asked: FilesOperation) -> Reading:
    return Reading(field="content", reader=await files.open(resolve(asked.path)))


async def _read_bytes(files: AgentFiles, asked: FilesOperation) -> Reading:
    return Reading(field="content_base64", reader=await files.open(resolve(asked.path)))


async def _read_range(files: AgentFiles, asked: FilesOperation) -> FilesAnswer | Reading:
    offset, length = _number(asked.offset, "offset"), _number(asked.length, "length")
    try:
        reader = await files.open(resolve(asked.path), offset=offset, length=length)
    except BadRange:
        # Whoever reads a file piece by piece asks once more at its end.
        return FilesAnswer(content_base64="")
    return Reading(field="content_base64", reader=reader)


async def _exists(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    path = resolve(asked.path)
    return FilesAnswer(exists=path == WORKSPACE or await files.exists(path))


async def _list(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    """By name; of a recursive list by path, a folder before what is in it. Links are not followed."""
    top = resolve(asked.path)
    found: list[FileEntry] = []
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            entries = await files.entries(folder, MAX_ENTRIES - len(found))
        except FileNotFound:
            if folder == top != WORKSPACE:
                raise
            continue  # removed meanwhile, or nobody has written there yet
        found += entries
        if len(found) > MAX_ENTRIES:
            field = "recursive" if asked.recursive else "path"
            raise BadField(field=field, problem=f"there are more than {MAX_ENTRIES} entries; list parts of it")
        if asked.recursive:
            folders += [entry.path for entry in entries if entry.type == "directory"]
    # Not in the event loop: the guest decides how much work the paths are.
    return FilesAnswer(entries=await asyncio.to_thread(_in_order, found))


def _in_order(found: list[FileEntry]) -> list[FileItem]:
    return sorted(map(_item, found), key=lambda item: item.path.split("/"))


async def _stat(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    path = resolve(asked.path)
    try:
        entry = await files.stat(path)
    except FileNotFound:
        if path != WORKSPACE:
            raise
        await files.make_folder(WORKSPACE)
        entry = await files.stat(path)
    return FilesAnswer(stat=_item(entry))


async def _grep(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    path = resolve(asked.path)
    try:
        found = await files.grep(
            path,
            pattern=asked.pattern,
            regex=asked.regex,
            case_insensitive=asked.case_insensitive,
            max_matches=max(0, asked.max_matches),
        )
    except FileNotFound:
        if path != WORKSPACE:
            raise
        return FilesAnswer(matches=[])
    hits = await asyncio.to_thread(_hits, found)
    return FilesAnswer(matches=hits, truncated=found.truncated or msgspec.UNSET)


def _hits(found: FileMatches) -> list[FileHit]:
    return [FileHit(path=relative(hit.path), line=hit.line, match=hit.match) for hit in found.matches]


def _item(entry: FileEntry) -> FileItem:
    return FileItem(
        path=relative(entry.path),
        name=entry.name if entry.path != WORKSPACE else ".",
        type=entry.type,
        size_bytes=entry.size_bytes if entry.type == "file" else 0,
        mode=entry.mode,
    )


async def _encode_bytes(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        data = rest + chunk
        whole = len(data) - len(data) % _GROUP
        rest = data[whole:]
        yield base64.b64encode(data[:whole])
    yield base64.b64encode(rest)


async def _encode_text(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    async for chunk in chunks:
        yield msgspec.json.encode(decoder.decode(chunk))[1:-1]
    yield msgspec.json.encode(decoder.decode(b"", final=True))[1:-1]


# -- writing ----------------------------------------------------------------------------------------------------------


async def _write_text(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    await files.write(resolve_below(asked.path), _text(asked), _mode(asked))
    return FilesAnswer()


async def _write_bytes(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    await files.write(resolve_below(asked.path), _bytes(asked), _mode(asked))
    return FilesAnswer()


async def _write_range(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    offset = _number(asked.offset, "offset")
    await files.write_at(resolve_below(asked.path), offset, _bytes(asked), _mode(asked))
    return FilesAnswer()


async def _make_folder(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    await files.make_folder(resolve(asked.path))
    return FilesAnswer()


async def _move(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    await files.move(resolve_below(asked.path), resolve_below(asked.to, "to"))
    return FilesAnswer()


async def _remove(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    await files.remove(resolve_below(asked.path), is_recursive=asked.recursive)
    return FilesAnswer()


async def _patch(files: AgentFiles, asked: FilesOperation) -> FilesAnswer:
    """Edit a text file: read, replaced, written whole. A patch that changes nothing writes nothing."""
    path = resolve_below(asked.path)
    if asked.set_contents is None and not asked.edits:
        raise BadField(field="edits", problem="give `edits`, `set_contents`, or both")
    before = None if asked.set_contents is not None else await _read_whole(files, path)
    text = asked.set_contents if asked.set_contents is not None else _decode(before or b"", asked.path)
    for number, edit in enumerate(asked.edits):
        if not edit.find or edit.find not in text:
            problem = "must not be empty" if not edit.find else f"{asked.path!r} does not have this text"
            raise BadField(field=f"edits[{number}].find", problem=problem)
        text = text.replace(edit.find, edit.replace)
        if len(text) > MAX_PATCH_BYTES:
            raise FileTooLarge(path=asked.path, size=len(text), operation="patch", limit=MAX_PATCH_BYTES)
    content = _encode(text, "set_contents")
    if content != before:
        await files.write(path, content, _mode(asked))
    return FilesAnswer(version=version_of(content))


def version_of(content: bytes) -> int:
    """The contract's version of a content: the first 8 bytes of its sha256, the top bit cleared."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") & ((1 << 63) - 1)


async def _read_whole(files: AgentFiles, path: str) -> bytes:
    reader = await files.open(path)
    if reader.size is None or reader.size > MAX_PATCH_BYTES:
        await reader.close()
        raise FileTooLarge(path=relative(path), size=reader.size or 0, operation="patch", limit=MAX_PATCH_BYTES)
    return await reader.read(MAX_PATCH_BYTES)


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise BadField(field="path", problem=f"{path!r} is no UTF-8 text; write it as bytes") from e


def _encode(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise BadField(field=field, problem="is no Unicode text: it has half a surrogate pair") from e


def _text(asked: FilesOperation) -> bytes:
    if asked.content is None:
        raise BadField(field="content", problem=f"{asked.operation} needs it; it may be empty")
    return _encode(asked.content, "content")


def _bytes(asked: FilesOperation) -> bytes:
    if asked.content_base64 is None:
        if asked.content is not None:
            return _text(asked)
        raise BadField(field="content_base64", problem=f"{asked.operation} needs it; it may be empty")
    try:
        return base64.b64decode(asked.content_base64, validate=True)
    except (binascii.Error, ValueError) as e:
        raise BadField(field="content_base64", problem=f"is no base64 ({e})") from e


def _mode(asked: FilesOperation) -> str:
    """Octal digits; empty: the file's own, 0644 for a new one."""
    try:
        mode = int(asked.mode, 8) if isinstance(asked.mode, str) and asked.mode else int(asked.mode or 0)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise BadField(field="mode", problem="must be octal digits like '0644', or the number that they stand for")
    return f"{mode:04o}" if mode else ""


def _number(value: int, field: str) -> int:
    if not 0 <= value <= _MAX_OFFSET:
        raise BadField(field=field, problem=f"must be 0 to {_MAX_OFFSET}")
    return value


_Operation: TypeAlias = Callable[[AgentFiles, FilesOperation], Awaitable[FilesAnswer | Reading]]
OPERATIONS: dict[str, _Operation] = {
    "read_text": _read_text,
    "read_bytes": _read_bytes,
    "read_range": _read_range,
    "write_text": _write_text,
    "write_bytes": _write_bytes,
    "write_range": _write_range,
    "remove": _remove,
    "list": _list,
    "stat": _stat,
    "exists": _exists,
    "patch": _patch,
    "mkdir": _make_folder,
    "move": _move,
    "grep": _grep,
}
