"""The file system of a fake machine: docs/guest-protocol.md, section 4, `/files` and `/archive`.

Files live in a dictionary that is shared with whoever else writes to the machine. Folders are those that were made,
and those above a file. There are no links, no owners but root, and nothing that the kernel would refuse.
"""

import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping

import msgspec

from fusevm.model.errors import (
    BadPath,
    BadRange,
    BadRequest,
    DirectoryNotEmpty,
    FileExists,
    FileNotFound,
    IsADirectory,
    NotADirectory,
    NotSupported,
    UnknownUser,
)
from fusevm.testing.fake_answer import FakeAnswer, decode, flag, render
from fusevm.wire.guest import Extracted, FileEntry, FileList, FileMatch, FileMatches, FilePatched, FileWritten

_FILE_MODE, _FOLDER_MODE = "0644", "0755"
#: Bytes of one name (linux/limits.h).
_LONGEST_NAME = 255
#: Bytes of a file, which is in memory here.
_LARGEST_FILE = 64 << 20


class _Operation(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /files`."""

    path: str = ""
    to: str = ""
    parents: bool = True
    mode: str = ""
    recursive: bool = False
    pattern: str = ""
    regex: bool = False
    case_insensitive: bool = False
    max_matches: int = 0


class FakeFiles:
    """The routes. Raises what the agent answers."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.content = self._files = files
        self._folders = {"/", "/tmp"}  # noqa: S108 - of a machine that does not exist
        self._modes: dict[str, str] = {}

    def answer(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> FakeAnswer | None:
        """Answer one request; None for a route that is not of these."""
        match method, path:
            case "GET" | "HEAD", "/files":
                return self._read(_path(query), headers.get("range", ""))
            case "PUT", "/files":
                return render(200, self._put(_path(query), query, body))
            case "PATCH", "/files":
                return render(200, self._patch(_path(query), query, body))
            case "DELETE", "/files":
                self._remove(_path(query), is_recursive=flag(query, "recursive", otherwise=False))
                return FakeAnswer(204)
            case "POST", "/files":
                return self._operate(query.get("op", ""), decode(body, _Operation))
            case "GET", "/archive":
                return FakeAnswer(200, self._archive(_path(query)), {"content-type": "application/x-tar"})
            case "PUT", "/archive":
                _check_user(query)
                return render(200, self._extract(_path(query), body))
            case _:
                return None

    # -- what is there -----------------------------------------------------------------------------------------------

    def _is_folder(self, path: str) -> bool:
        return path in self._folders or any(True for _ in self._below(path))

    def _below(self, path: str) -> Iterator[str]:
        """Everything in a folder, at any depth."""
        prefix = path.rstrip("/") + "/"
        return (other for other in (*self._files, *self._folders) if other.startswith(prefix) and other != prefix)

    def _exists(self, path: str) -> bool:
        """Is there anything? Raises NotADirectory, BadPath."""
        if any(len(name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME for name in path.split("/")):
            raise BadPath(path=path)
        above = posixpath.dirname(path)
        while above != "/":
            if above in self._files:
                raise NotADirectory(path=path)
            above = posixpath.dirname(above)
        return path in self._files or self._is_folder(path)

    def _check_exists(self, path: str) -> None:
        if not self._exists(path):
            raise FileNotFound(path=path)

    def _entry(self, path: str) -> FileEntry:
        self._check_exists(path)
        is_file = path in self._files
        return FileEntry(
            path=path,
            name=posixpath.basename(path) or "/",
            type="file" if is_file else "directory",
            size_bytes=len(self._files[path]) if is_file else 0,
            mode=self._modes.get(path, _FILE_MODE if is_file else _FOLDER_MODE),
            mtime_ms=1,
        )

    def _names(self, path: str) -> list[str]:
        """Of what is in a folder."""
        start = len(path.rstrip("/")) + 1
        return sorted({other[start:].partition("/")[0] for other in self._below(path)})

    # -- files -------------------------------------------------------------------------------------------------------

    def _content(self, path: str) -> bytes:
        self._check_exists(path)
        if path not in self._files:
            raise IsADirectory(path=path)
        return self._files[path]

    def _read(self, path: str, asked: str) -> FakeAnswer:
        content = self._content(path)
        headers = {
            "content-type": "application/octet-stream",
            "accept-ranges": "bytes",
            "x-fuse-mode": self._modes.get(path, _FILE_MODE),
            "x-fuse-mtime-ms": "1",
        }
        part = _range(asked, len(content))
        if part is None:
            return FakeAnswer(200, content, headers)
        headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{len(content)}"
        return FakeAnswer(206, content[part.start : part.stop], headers)

    def _put(self, path: str, query: Mapping[str, str], body: bytes) -> FileWritten:
        mode = _mode(query.get("mode", ""))
        _check_user(query)
        folder = posixpath.dirname(path)
        if flag(query, "mkdirs", otherwise=True):
            self._make_folders(folder)
        else:
            self._check_exists(folder)
        self._write(path, body)
        if mode:
            self._modes[path] = mode
        return FileWritten(path=path, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())

    def _patch(self, path: str, query: Mapping[str, str], body: bytes) -> FilePatched:
        offset = int(query.get("offset") or 0)
        if offset + len(body) > _LARGEST_FILE:
            raise BadRequest(field="offset")
        old = self._content(path) if self._exists(path) else b""
        self._make_folders(posixpath.dirname(path))
        self._write(path, old[:offset].ljust(offset, b"\0") + body + old[offset + len(body) :])
        if not old and query.get("mode"):
            self._modes[path] = _mode(query["mode"])
        return FilePatched(path=path, size_bytes=len(self._files[path]))

    def _write(self, path: str, body: bytes) -> None:
        if self._exists(path) and path not in self._files:
            raise IsADirectory(path=path)
        self._files[path] = body

    def _operate(self, name: str, asked: _Operation) -> FakeAnswer:
        path = _clean(asked.path)
        match name:
            case "stat":
                return render(200, self._entry(path))
            case "list":
                return render(200, self._list(path))
            case "mkdir":
                self._make(path, asked)
                return render(200, self._entry(path))
            case "move":
                return render(200, self._move(path, _clean(asked.to)))
            case "remove":
                self._remove(path, is_recursive=asked.recursive)
                return FakeAnswer(204)
            case "grep":
                return render(200, self._grep(path, asked))
            case _:
                raise BadRequest(field="op")

    def _grep(self, path: str, asked: _Operation) -> FileMatches:
        self._check_exists(path)
        try:
            pattern = asked.pattern if asked.regex else re.escape(asked.pattern)
            wanted = re.compile(pattern, re.IGNORECASE if asked.case_insensitive else 0)
        except re.error:
            raise BadRequest(field="pattern") from None
        most = asked.max_matches or 1000
        matches = [
            FileMatch(path=name, line=number, match=found.group())
            for name in ([path] if path in self._files else sorted(set(self._below(path)) & self._files.keys()))
            if b"\0" not in self._files[name]
            for number, line in enumerate(self._files[name].decode(errors="replace").splitlines(), 1)
            if (found := wanted.search(line))
        ]
        return FileMatches(matches=matches[:most], truncated=len(matches) > most)

    def _list(self, path: str) -> FileList:
        self._check_exists(path)
        if path in self._files:
            raise NotADirectory(path=path)
        return FileList(entries=[self._entry(posixpath.join(path, name)) for name in self._names(path)])

    def _make(self, path: str, asked: _Operation) -> None:
        mode = _mode(asked.mode) or _FOLDER_MODE
        is_new = not self._exists(path)
        if asked.parents:
            self._make_folders(path)
        elif not is_new:
            raise FileExists(path=path)
        else:
            self._check_exists(posixpath.dirname(path))
            self._folders.add(path)
        if is_new:
            self._modes[path] = mode

    def _make_folders(self, path: str) -> None:
        if self._exists(path) and path in self._files:
            raise NotADirectory(path=path)
        while path != "/":
            self._folders.add(path)
            path = posixpath.dirname(path)

    def _move(self, path: str, to: str) -> FileEntry:
        self._check_exists(path)
        self._check_exists(posixpath.dirname(to))
        is_there = self._exists(to)
        if to != path:
            self._check_replaceable(path, to, is_there=is_there)
            self._rename(path, to)
        return self._entry(to)

    def _check_replaceable(self, path: str, to: str, *, is_there: bool) -> None:
        if to.startswith(path.rstrip("/") + "/"):
            raise BadRequest(field="to")
        if not is_there:
            return
        if path in self._files and to not in self._files:
            # rename(2) has another name for it than for other uses of a folder.
            raise FileExists(path=to)
        if path not in self._files and to in self._files:
            raise NotADirectory(path=to)
        if any(True for _ in self._below(to)):
            raise FileExists(path=to)

    def _rename(self, path: str, to: str) -> None:
        for old in [path, *self._below(path)]:
            new = to + old[len(path) :]
            if old in self._files:
                self._files[new] = self._files.pop(old)
            else:
                self._folders.discard(old)
                self._folders.add(new)
            if old in self._modes:
                self._modes[new] = self._modes.pop(old)

    def _remove(self, path: str, *, is_recursive: bool) -> None:
        if path == "/":
            raise BadPath(path=path)
        self._check_exists(path)
        below = list(self._below(path))
        if below and not is_recursive:
            raise DirectoryNotEmpty(path=path)
        # A folder that exists only by what is in it stays one when that is gone.
        self._make_folders(posixpath.dirname(path))
        for gone in [path, *below]:
            self._files.pop(gone, None)
            self._folders.discard(gone)
            self._modes.pop(gone, None)

    # -- archives ----------------------------------------------------------------------------------------------------

    def _archive(self, path: str) -> bytes:
        self._check_exists(path)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            self._pack(archive, path, posixpath.basename(path) or ".")
        return out.getvalue()

    def _pack(self, archive: tarfile.TarFile, path: str, name: str) -> None:
        member = tarfile.TarInfo(name)
        member.mode = int(self._entry(path).mode, 8)
        if path in self._files:
            member.size = len(self._files[path])
            archive.addfile(member, io.BytesIO(self._files[path]))
            return
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
        for below in self._names(path):
            self._pack(archive, posixpath.join(path, below), f"{name}/{below}")

    def _extract(self, folder: str, body: bytes) -> Extracted:
        self._check_exists(folder)
        if folder in self._files:
            raise NotADirectory(path=folder)
        entries = size = 0
        try:
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                for member in archive:
                    size += self._unpack(archive, folder, member)
                    entries += 1
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if body:
                raise BadRequest(field="body") from error
        return Extracted(entries=entries, bytes=size)

    def _unpack(self, archive: tarfile.TarFile, folder: str, member: tarfile.TarInfo) -> int:
        """One entry; the size of its content."""
        name = member.name
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise BadPath(path=name)
        path = _clean(posixpath.join(folder, name))
        if member.isdir():
            self._make_folders(path)
            return 0
        content = archive.extractfile(member) if member.isreg() else None
        if content is None:
            raise NotSupported(feature=f"the archive's entry {name}")
        data = content.read()
        if len(data) != member.size:
            raise BadRequest(field="body")
        self._make_folders(posixpath.dirname(path))
        self._write(path, data)
        return len(data)


def _path(query: Mapping[str, str]) -> str:
    return _clean(query.get("path", ""))


def _clean(path: str) -> str:
    """The path in its shortest form. Raises BadPath."""
    if not path.startswith("/") or "\0" in path:
        raise BadPath(path=path)
    return posixpath.normpath("/" + path.lstrip("/"))


def _mode(text: str) -> str:
    """Octal permission bits as they are shown; empty for none. Raises BadRequest."""
    try:
        value = int(text or "0", 8)
    except ValueError:
        raise BadRequest(field="mode") from None
    if not 0 <= value <= 0o7777:
        raise BadRequest(field="mode")
    return f"0{value:03o}" if text else ""


def _check_user(query: Mapping[str, str]) -> None:
    name = query.get("user", "")
    if name not in ("", "root") and not all(part.isdecimal() for part in name.split(":", 1)):
        raise UnknownUser(user=name)


def _range(asked: str, size: int) -> range | None:
    """The bytes of a Range header; None: all, since it is no single byte range (RFC 9110). Raises BadRange."""
    text = asked.removeprefix("bytes=").strip()
    first, dash, last = text.partition("-")
    is_range = asked.startswith("bytes=") and dash and all(map(_is_number, (first, last)))
    if not is_range or first == last == "":
        return None
    if first == "":
        if int(last) == 0 or size == 0:
            raise BadRange(size=size)
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        raise BadRange(size=size)
    return range(int(first), min(int(last), size - 1) + 1 if last else size)


def _is_number(text: str) -> bool:
    return text == "" or (text.isascii() and text.isdecimal() and len(text) < 19)
