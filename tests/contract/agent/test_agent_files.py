"""Files and archives, and what feeds a process: docs/guest-protocol.md, section 4."""

import io
import tarfile
from typing import Any
from urllib.parse import quote

import pytest
from agent_client import AgentClient

from fusevm.model.errors import (
    BadPath,
    BadRange,
    BadRequest,
    DirectoryNotEmpty,
    Error,
    FileExists,
    FileNotFound,
    IsADirectory,
    NotADirectory,
    NotSupported,
    ProcessNotFound,
    StdinClosed,
    UnknownSignal,
    UnknownUser,
)
from fusevm.wire.guest import (
    ExecRequest,
    Extracted,
    FileEntry,
    FileList,
    FileMatches,
    FilePatched,
    FileWritten,
    Process,
)


def at(path: str, **query: str) -> str:
    return f"/files?path={quote(path)}" + "".join(f"&{name}={value}" for name, value in query.items())


async def put(agent: AgentClient, path: str, content: bytes, **query: str) -> FileWritten:
    return await agent.ask("PUT", at(path, **query), FileWritten, content)


async def operate(agent: AgentClient, operation: str, kind: type[Any] = FileEntry, **body: Any) -> Any:
    return await agent.ask("POST", f"/files?op={operation}", kind, body)


async def names(agent: AgentClient, path: str) -> list[tuple[str, str]]:
    return [(entry.name, entry.type) for entry in (await operate(agent, "list", FileList, path=path)).entries]


def tar_of(*members: tuple[str, bytes | None], kind: bytes = tarfile.REGTYPE) -> bytes:
    """Files with content, folders with None."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else kind
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return out.getvalue()


async def test_a_file_is_written_read_replaced_and_removed(machine, agent):
    path = machine.path("new/folder/file")
    written = await put(agent, path, b"one")
    assert (written.path, written.size_bytes, len(written.sha256)) == (path, 3, 64)
    assert await agent.call("GET", at(path)) == (200, b"one")
    await put(agent, path, b"", mode="0600")
    assert await agent.call("GET", at(path)) == (200, b"")
    entry = await operate(agent, "stat", path=path)
    assert (entry.path, entry.name, entry.type, entry.size_bytes, entry.mode) == (path, "file", "file", 0, "0600")
    await put(agent, path, b"two")
    assert (await operate(agent, "stat", path=path)).mode == "0600"
    assert await agent.call("DELETE", at(path)) == (204, b"")
    with pytest.raises(FileNotFound):
        await agent.call("GET", at(path))


@pytest.mark.parametrize(
    ("asked", "status", "content", "where"),
    [
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=8-", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=0-0,2-2", 200, b"0123456789", ""),
        ("bytes=5-2", 200, b"0123456789", ""),
        ("lines=1-2", 200, b"0123456789", ""),
        ("bytes=x-", 200, b"0123456789", ""),
    ],
)
async def test_a_range_is_a_part(machine, agent, asked, status, content, where):
    path = machine.path("file")
    await put(agent, path, b"0123456789")
    async with agent.exchange("GET", at(path), range=asked) as response:
        assert (response.status, await response.read()) == (status, content)
        assert response.headers.get("content-range", "") == where
        assert response.headers["x-fuse-mode"] == "0644"


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=-0"])
async def test_a_range_that_the_file_does_not_have_is_refused(machine, agent, asked):
    path = machine.path("file")
    await put(agent, path, b"0123456789")
    async with agent.exchange("GET", at(path), range=asked) as response:
        assert response.status == BadRange.status
        assert b"bad_range" in await response.read()


async def test_a_part_of_a_file_is_written_in_place(machine, agent):
    path = machine.path("new/file")
    patched = await agent.ask("PATCH", at(path, offset="4", mode="0640"), FilePatched, b"end")
    assert (patched.path, patched.size_bytes) == (path, 7)
    assert await agent.call("GET", at(path)) == (200, b"\0\0\0\0end")
    assert (await agent.ask("PATCH", at(path, offset="0"), FilePatched, b"ab")).size_bytes == 7
    assert await agent.call("GET", at(path)) == (200, b"ab\0\0end")
    assert (await operate(agent, "stat", path=path)).mode == "0640"
    with pytest.raises(IsADirectory):
        await agent.call("PATCH", at(machine.path("new")), b"x")
    with pytest.raises(BadRequest):
        await agent.call("PATCH", at(path, offset=str((1 << 63) - 1)), b"x")


async def test_lines_are_found(machine, agent):
    await put(agent, machine.path("tree/b/deep"), b"x\nthe Word\n")
    await put(agent, machine.path("tree/a"), b"word word\nw.rd\nno")
    await put(agent, machine.path("tree/binary"), b"word\0")
    top = machine.path("tree")

    async def found(**query: Any) -> list[tuple[str, int, str]]:
        answer = await operate(agent, "grep", FileMatches, path=top, **query)
        return [(match.path.removeprefix(top), match.line, match.match) for match in answer.matches]

    assert await found(pattern="word") == [("/a", 1, "word")]
    assert await found(pattern="w.rd") == [("/a", 2, "w.rd")]
    assert await found(pattern="w.rd", regex=True) == [("/a", 1, "word"), ("/a", 2, "w.rd")]
    assert await found(pattern="word", case_insensitive=True) == [("/a", 1, "word"), ("/b/deep", 2, "Word")]
    assert await found(pattern="nothing") == []
    bounded = await operate(agent, "grep", FileMatches, path=top, pattern=".", regex=True, max_matches=1)
    assert (len(bounded.matches), bounded.truncated) == (1, True)
    with pytest.raises(BadRequest):
        await found(pattern="(", regex=True)
    with pytest.raises(FileNotFound):
        await operate(agent, "grep", FileMatches, path=machine.path("none"), pattern="x")


async def test_the_head_of_a_file_is_its_headers(machine, agent):
    path = machine.path("file")
    await put(agent, path, b"0123456789")
    async with agent.exchange("HEAD", at(path)) as response:
        assert (response.status, response.headers["content-length"]) == (200, "10")


async def test_folders_are_made_listed_moved_and_removed(machine, agent):
    top = machine.path("top")
    made = await operate(agent, "mkdir", path=f"{top}/a/b", mode="0700")
    assert (made.name, made.type, made.mode) == ("b", "directory", "0700")
    again = await operate(agent, "mkdir", path=f"{top}/a/b", mode="0755")
    assert again.mode == "0700"
    await put(agent, f"{top}/a/file", b"x")
    assert await names(agent, f"{top}/a") == [("b", "directory"), ("file", "file")]
    moved = await operate(agent, "move", path=f"{top}/a", to=f"{top}/c")
    assert moved.path == f"{top}/c"
    assert await names(agent, top) == [("c", "directory")]
    assert await agent.call("GET", at(f"{top}/c/file")) == (200, b"x")
    with pytest.raises(DirectoryNotEmpty):
        await agent.call("POST", "/files?op=remove", {"path": f"{top}/c"})
    with pytest.raises(DirectoryNotEmpty):
        await agent.call("DELETE", at(top))
    await agent.call("POST", "/files?op=remove", {"path": f"{top}/c", "recursive": True})
    assert await names(agent, top) == []
    await agent.call("DELETE", at(top))
    with pytest.raises(FileNotFound):
        await operate(agent, "stat", path=top)


async def test_a_path_is_taken_in_its_shortest_form(machine, agent):
    path = machine.path("top/file")
    await put(agent, path, b"x")
    assert await agent.call("GET", at(machine.path("top//./nothing/../file"))) == (200, b"x")
    assert (await operate(agent, "stat", path="/" + machine.path("top/"))).path == machine.path("top")
    assert (await operate(agent, "stat", path="/")).name == "/"


async def test_a_move_replaces_a_file(machine, agent):
    old, new = machine.path("old"), machine.path("new")
    await put(agent, old, b"old")
    await put(agent, new, b"new")
    assert (await operate(agent, "move", path=old, to=new)).size_bytes == 3
    assert await agent.call("GET", at(new)) == (200, b"old")
    assert (await operate(agent, "move", path=new, to=new)).path == new


REFUSALS: list[tuple[str, str, Any, type[Error]]] = [
    ("GET", "/files?path=relative", None, BadPath),
    ("GET", "/files", None, BadPath),
    ("GET", "{top}/nothing", None, FileNotFound),
    ("GET", "{top}/folder", None, IsADirectory),
    ("GET", "{top}/file/below", None, NotADirectory),
    ("PUT", "{top}/folder", b"", IsADirectory),
    ("PUT", "{top}/file/below", b"", NotADirectory),
    ("PUT", "{top}/a/b&mkdirs=false", b"", FileNotFound),
    ("PUT", "{top}/new&mode=999", b"", BadRequest),
    ("PUT", "{top}/new&mkdirs=perhaps", b"", BadRequest),
    ("PUT", "{top}/new&user=nobody-of-that-name", b"", UnknownUser),
    ("PUT", "{top}/" + "x" * 256, b"", BadPath),
    ("DELETE", "{top}/nothing", None, FileNotFound),
    ("DELETE", "/files?path=/", None, BadPath),
    ("POST", "/files?op=fly", {"path": "/"}, BadRequest),
    ("POST", "/files?op=stat", {"path": 1}, BadRequest),
    ("POST", "/files?op=stat", {"path": "relative"}, BadPath),
    ("POST", "/files?op=stat", {"path": "{top}/nothing"}, FileNotFound),
    ("POST", "/files?op=list", {"path": "{top}/file"}, NotADirectory),
    ("POST", "/files?op=list", {"path": "{top}/nothing"}, FileNotFound),
    ("POST", "/files?op=mkdir", {"path": "{top}/folder", "parents": False}, FileExists),
    ("POST", "/files?op=mkdir", {"path": "{top}/file"}, NotADirectory),
    ("POST", "/files?op=mkdir", {"path": "{top}/a/b", "parents": False}, FileNotFound),
    ("POST", "/files?op=mkdir", {"path": "{top}/new", "mode": "8"}, BadRequest),
    ("POST", "/files?op=move", {"path": "{top}/nothing", "to": "{top}/new"}, FileNotFound),
    ("POST", "/files?op=move", {"path": "{top}/file", "to": "relative"}, BadPath),
    ("POST", "/files?op=move", {"path": "{top}/file", "to": "{top}/a/b"}, FileNotFound),
    ("POST", "/files?op=move", {"path": "{top}/file", "to": "{top}/folder"}, FileExists),
    ("POST", "/files?op=move", {"path": "{top}/folder", "to": "{top}/file"}, NotADirectory),
    ("POST", "/files?op=remove", {"path": "{top}/nothing"}, FileNotFound),
    ("GET", "/archive?path={disk}/nothing", None, FileNotFound),
    ("PUT", "/archive?path={disk}/nothing", b"", FileNotFound),
    ("PUT", "/archive?path={disk}/file", b"", NotADirectory),
    ("PUT", "/archive?path={disk}/folder", b"no archive", BadRequest),
    ("PUT", "/archive?path={disk}/folder", tar_of(("a", b"x" * 2000))[:1500], BadRequest),
    ("PUT", "/archive?path={disk}/folder", tar_of(("../a", b"x")), BadPath),
    ("PUT", "/archive?path={disk}/folder", tar_of(("/a", b"x")), BadPath),
    ("PUT", "/archive?path={disk}/folder", tar_of(("pipe", b""), kind=tarfile.FIFOTYPE), NotSupported),
    ("PUT", "/archive?path={disk}", tar_of(("folder", b"x")), IsADirectory),
]


@pytest.mark.parametrize(("method", "target", "body", "expected"), REFUSALS, ids=lambda value: repr(value)[:60])
async def test_what_does_not_fit_is_refused(machine, agent, method, target, body, expected):
    disk = machine.path("disk")
    await put(agent, f"{disk}/file", b"x")
    await put(agent, f"{disk}/folder/inside", b"x")
    target = target.replace("{top}", f"/files?path={disk}").replace("{disk}", disk)
    if isinstance(body, dict):
        body = {key: value.replace("{top}", disk) if isinstance(value, str) else value for key, value in body.items()}
    with pytest.raises(Error) as caught:
        await agent.call(method, target, body)
    assert type(caught.value) is expected


async def test_a_folder_travels_as_an_archive(machine, agent):
    here, there = machine.path("here"), machine.path("there")
    await put(agent, f"{here}/a/file", b"contents")
    await operate(agent, "mkdir", path=f"{here}/empty")
    await operate(agent, "mkdir", path=there)
    _, packed = await agent.call("GET", f"/archive?path={here}")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getnames() == ["here", "here/a", "here/a/file", "here/empty"]
    done = await agent.ask("PUT", f"/archive?path={there}", Extracted, packed)
    assert (done.entries, done.bytes) == (4, 8)
    assert await agent.call("GET", at(f"{there}/here/a/file")) == (200, b"contents")
    assert await names(agent, f"{there}/here") == [("a", "directory"), ("empty", "directory")]
    _, single = await agent.call("GET", f"/archive?path={here}/a/file")
    with tarfile.open(fileobj=io.BytesIO(single)) as archive:
        assert archive.getnames() == ["file"]
    assert (await agent.ask("PUT", f"/archive?path={there}", Extracted, b"")).entries == 0


async def test_what_is_written_to_a_process_is_read_by_it(agent):
    process = await agent.ask("POST", "/processes", Process, ExecRequest(cmd=["cat"], stdin=True))
    place = f"/processes/{process.pid}"
    assert await agent.call("POST", f"{place}/stdin", b"one ") == (200, b'{"bytes":4}')
    assert await agent.call("POST", f"{place}/stdin?eof=true", b"two") == (200, b'{"bytes":3}')
    assert (await agent.call("GET", f"{place}/output?offset=0&follow=true"))[1] == b"one two"
    with pytest.raises(StdinClosed):
        await agent.call("POST", f"{place}/stdin", b"three")


@pytest.mark.parametrize("signal", ["TERM", "SIGTERM", "term", "15"])
async def test_a_signal_has_a_name_or_a_number(agent, signal):
    process = await agent.ask("POST", "/processes", Process, ExecRequest(cmd=["sleep", "100000"]))
    place = f"/processes/{process.pid}"
    for wrong in ("NOPE", "0", "65", "9x"):
        with pytest.raises(UnknownSignal):
            await agent.call("POST", f"{place}/signal", {"signal": wrong})
    with pytest.raises(BadRequest):
        await agent.call("POST", f"{place}/signal", {"signal": ""})
    await agent.call("POST", f"{place}/signal", {"signal": signal})
    await agent.call("GET", f"{place}/output?follow=true")
    ended = await agent.ask("GET", place, Process)
    assert ended.exit is not None
    assert ended.exit.exit_code == 143
    with pytest.raises(ProcessNotFound):
        await agent.call("POST", f"{place}/signal", {"signal": signal})


@pytest.mark.parametrize("query", ["stream=nope", "offset=-1", "offset=1", "offset=x", "follow=perhaps"])
async def test_output_that_does_not_exist_cannot_be_asked_for(agent, query):
    process = await agent.ask("POST", "/processes", Process, ExecRequest(cmd=["true"]))
    with pytest.raises(BadRequest):
        await agent.call("GET", f"/processes/{process.pid}/output?{query}")


@pytest.mark.parametrize("asked", [ExecRequest(), ExecRequest(cmd=["true"], shell="true")])
async def test_a_command_is_words_or_a_text(agent, asked):
    for path in ("/exec", "/processes"):
        with pytest.raises(BadRequest):
            await agent.call("POST", path, asked)
