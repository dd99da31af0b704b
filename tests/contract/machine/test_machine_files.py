"""files/ops: every operation, on a machine that runs and on one that rests, with the same answers."""

import asyncio
import base64
import hashlib
import threading
from collections.abc import AsyncIterator

import msgspec
import pytest
from machine_client import MachineApi

from fusevm.host import visitors
from fusevm.host.contract import agent_files, operations
from fusevm.host.contract.agent_files import Reader
from fusevm.host.contract.operations import OPERATIONS
from fusevm.model.errors import (
    BadField,
    BootFailed,
    DirectoryNotEmpty,
    FileNotFound,
    FileTooLarge,
    HostFull,
    IsADirectory,
    MachineNotFound,
    WrongState,
)
from fusevm.testing.fake_answer import FakeAnswer
from fusevm.testing.host_world import until
from fusevm.wire.contract import FilesOperation
from fusevm.wire.decode import decode_body

ROOT = "/home/node/workspace"


@pytest.fixture(autouse=True)
def _short_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "LINGER_S", 0.01)


@pytest.fixture(params=["running", "stopped"])
async def machine(api: MachineApi, request: pytest.FixtureRequest) -> MachineApi:
    """A machine in either phase."""
    await api.create()
    if request.param == "stopped":
        await api.call("POST", "/machines/m-1/stop", status=204)
    return api


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def test_text_and_bytes_are_written_and_read(machine: MachineApi):
    assert await machine.files("write_text", path="a/b.txt", content="grüße\n") == {}
    assert await machine.files("read_text", path="a/b.txt") == {"content": "grüße\n"}
    assert await machine.files("read_text", path=f"{ROOT}/a/b.txt") == {"content": "grüße\n"}
    assert await machine.files("read_bytes", path="./a/../a/b.txt") == {"content_base64": b64("grüße\n".encode())}
    content = bytes(range(256)) * 1000 + b"\n"
    assert await machine.files("write_bytes", path="raw", content_base64=b64(content), mode="0600") == {}
    assert await machine.files("read_bytes", path="raw") == {"content_base64": b64(content)}
    assert (await machine.files("stat", path="raw"))["stat"] == {
        "path": "raw",
        "name": "raw",
        "type": "file",
        "size_bytes": len(content),
        "mode": "0600",
    }


async def test_what_is_no_text_is_replaced_as_in_the_contract(machine: MachineApi):
    await machine.files("write_bytes", path="raw", content_base64=b64(b'"a\\\xff\xfe\x01'))
    assert await machine.files("read_text", path="raw") == {"content": '"a\\\ufffd\ufffd\x01'}


async def test_ranges_are_read_and_written(machine: MachineApi):
    await machine.files("write_text", path="f", content="0123456789")
    assert await machine.files("read_range", path="f", offset=2, length=3) == {"content_base64": b64(b"234")}
    assert await machine.files("read_range", path="f", offset=8) == {"content_base64": b64(b"89")}
    assert await machine.files("read_range", path="f", offset=8, length=100) == {"content_base64": b64(b"89")}
    assert await machine.files("read_range", path="f", offset=10, length=5) == {"content_base64": ""}
    await machine.files("write_range", path="f", offset=9, content_base64=b64(b"ab"))
    assert await machine.files("read_text", path="f") == {"content": "012345678ab"}
    await machine.files("write_range", path="new", offset=2, content="x")
    assert await machine.files("read_bytes", path="new") == {"content_base64": b64(b"\0\0x")}


async def test_folders_are_made_listed_moved_and_removed(machine: MachineApi):
    assert await machine.files("list") == {"entries": []}
    assert await machine.files("mkdir", path="src/deep") == {}
    await machine.files("write_text", path="src/a", content="x")
    listed = (await machine.files("list", path="src"))["entries"]
    assert [(item["path"], item["name"], item["type"]) for item in listed] == [
        ("src/a", "a", "file"),
        ("src/deep", "deep", "directory"),
    ]
    await machine.files("write_text", path="src/deep/b", content="x")
    everything = (await machine.files("list", path=".", recursive=True))["entries"]
    assert [item["path"] for item in everything] == ["src", "src/a", "src/deep", "src/deep/b"]
    assert await machine.files("move", path="src", to="lib") == {}
    assert await machine.files("exists", path="src") == {"exists": False}
    assert await machine.files("exists", path="lib/deep/b") == {"exists": True}
    assert await machine.files("exists", path="lib/a/none") == {"exists": False}
    assert isinstance(await machine.files_fail("remove", path="lib"), DirectoryNotEmpty)
    assert await machine.files("remove", path="lib", recursive=True) == {}
    assert isinstance(await machine.files_fail("stat", path="lib"), FileNotFound)
    assert (await machine.files("stat"))["stat"]["path"] == "."


async def test_a_patch_replaces_every_occurrence_and_tells_the_version(machine: MachineApi):
    await machine.files("write_text", path="f", content="one two one", mode="0755")
    edits = [{"find": "one", "replace": "1"}, {"find": "two", "replace": "2"}]
    answer = await machine.files("patch", path="f", edits=edits)
    assert await machine.files("read_text", path="f") == {"content": "1 2 1"}
    first = int.from_bytes(hashlib.sha256(b"1 2 1").digest()[:8], "big")
    assert answer == {"version": first & (2**63 - 1)}
    assert (await machine.files("stat", path="f"))["stat"]["mode"] == "0755"
    error = await machine.files_fail("patch", path="f", edits=[{"find": "three", "replace": ""}])
    assert (error.reason, "edits[0].find" in error.message) == ("bad_field", True)
    assert await machine.files("patch", path="g", set_contents="new", edits=[{"find": "n", "replace": "N"}])
    assert await machine.files("read_text", path="g") == {"content": "New"}


async def test_lines_are_found(machine: MachineApi):
    assert await machine.files("grep", pattern="x") == {"matches": []}
    await machine.files("write_text", path="d/a", content="Alpha\nbeta beta\n")
    await machine.files("write_text", path="d/b", content="al.ha")
    assert await machine.files("grep", pattern="beta") == {"matches": [{"path": "d/a", "line": 2, "match": "beta"}]}
    assert await machine.files("grep", path="d", pattern="al.ha", case_insensitive=True, regex=True) == {
        "matches": [{"path": "d/a", "line": 1, "match": "Alpha"}, {"path": "d/b", "line": 1, "match": "al.ha"}]
    }
    found = await machine.files("grep", pattern="a", max_matches=1)
    assert (len(found["matches"]), found["truncated"]) == (1, True)


async def test_what_cannot_be_done_is_said(machine: MachineApi):
    await machine.files("write_text", path="d/f", content="x")
    assert isinstance(await machine.files_fail("read_text", path="d"), IsADirectory)
    assert isinstance(await machine.files_fail("read_bytes", path="none"), FileNotFound)
    for path in ("..", "/etc/passwd", "../workspace2", f"{ROOT}/../x", "a\nb", "a\0b", "x" * 5000):
        assert isinstance(await machine.files_fail("read_text", path=path), BadField), path
    for operation in ("write_text", "remove", "patch"):
        error = await machine.files_fail(operation, path=".", content="", set_contents="")
        assert isinstance(error, BadField)
    assert isinstance(await machine.files_fail("write_bytes", path="f", content_base64="%%%"), BadField)
    assert isinstance(await machine.files_fail("write_text", path="f"), BadField)
    assert isinstance(await machine.files_fail("write_text", path="f", content="", mode="rwx"), BadField)
    assert isinstance(await machine.files_fail("read_range", path="d/f", offset=-1), BadField)
    assert (await machine.files_fail("grep", pattern="(", regex=True)).code == "invalid_argument"
    assert (await machine.files_fail("chmod", path="f")).reason == "bad_json"


async def test_a_huge_offset_takes_no_memory(api: MachineApi):
    """It becomes the agent's pwrite: the request is as large as its content."""
    await api.create()
    await api.files("write_text", path="f", content="0123")
    await api.files_fail("write_range", path="f", offset=(1 << 55), content="x")
    agent = api.world.driver.processes["m-1"].agent
    assert f"offset={1 << 55}" in next(request for request in reversed(agent.requests) if "PATCH" in request)
    assert await api.files("read_range", path="f", offset=1 << 55, length=1 << 40) == {"content_base64": ""}
    assert (await api.files_fail("write_range", path="f", offset=1 << 57, content="x")).reason == "bad_field"


async def test_what_is_too_large_for_json_is_refused(api: MachineApi, monkeypatch: pytest.MonkeyPatch):
    await api.create()
    monkeypatch.setattr(operations, "MAX_PATCH_BYTES", 10)
    await api.files("write_text", path="f", content="12345678901")
    error = await api.files_fail("patch", path="f", edits=[{"find": "1", "replace": "2"}])
    assert isinstance(error, FileTooLarge)
    assert (error.reason, error.status, error.size) == ("file_too_large", 413, 11)
    await api.files("write_text", path="g", content="1")
    bomb = [{"find": "1", "replace": "1" * 20}]
    assert (await api.files_fail("patch", path="g", edits=bomb)).reason == "file_too_large"
    assert await api.files("read_text", path="g") == {"content": "1"}


async def test_a_guest_that_answers_nothing_or_nonsense_costs_one_request(
    api: MachineApi, monkeypatch: pytest.MonkeyPatch
):
    await api.create()
    agent = api.world.driver.processes["m-1"].agent
    for content in (b"{", b'{"entries": 5}'):
        nonsense = FakeAnswer(200, content)
        monkeypatch.setattr(agent._disk, "answer", lambda *_words, nonsense=nonsense: nonsense)
        assert (await api.files_fail("list")).reason == "agent_failure"
    evil = {"path": "", "name": "../../x", "type": "directory"}
    loop = FakeAnswer(200, msgspec.json.encode({"entries": [evil, {**evil, "path": "relative"}]}))
    monkeypatch.setattr(agent._disk, "answer", lambda *_words: loop)
    monkeypatch.setattr(operations, "MAX_ENTRIES", 50)
    assert isinstance(await api.files_fail("list", recursive=True), BadField)
    assert [item["path"] for item in (await api.files("list"))["entries"]] == [".", "relative"]
    monkeypatch.setattr(operations, "OPERATION_S", 0.05)
    api.world.driver.holds.hold("agent")
    fresh = await api.daemon.machines.guest("m-1", None)
    await fresh.close()
    assert (await api.files_fail("list")).reason == "timeout"


async def test_a_guest_that_lists_without_end_costs_no_more_than_a_full_folder(
    api: MachineApi, monkeypatch: pytest.MonkeyPatch
):
    await api.create()
    agent = api.world.driver.processes["m-1"].agent

    def answer(**content: object) -> None:
        told = FakeAnswer(200, msgspec.json.encode(content))
        monkeypatch.setattr(agent._disk, "answer", lambda *_words: told)

    one = {"path": f"{ROOT}/a", "name": "a", "type": "file"}
    looked_at = []
    monkeypatch.setattr(operations, "_item", looked_at.append)
    answer(entries=[one] * (operations.MAX_ENTRIES + 1))
    for is_recursive in (False, True):
        error = await api.files_fail("list", recursive=is_recursive)
        assert isinstance(error, BadField)
        assert str(operations.MAX_ENTRIES) in error.message
    assert not looked_at
    for more in ({"path": "a" * 4097}, {"name": "a" * 256}, {"mode": "0" * 9}):
        answer(entries=[{**one, **more}])
        assert (await api.files_fail("list")).reason == "agent_failure"
    answer(**{**one, "path": "a" * 4097})
    assert (await api.files_fail("stat")).reason == "agent_failure"
    answer(matches=[{"path": "a", "line": 1, "match": "x"}] * 10_001)
    assert (await api.files_fail("grep", pattern="x")).reason == "agent_failure"
    monkeypatch.setattr(agent_files, "_MAX_ANSWER_BYTES", 10)
    error = await api.files_fail("list")
    assert error.reason == "agent_failure"
    assert "ask for less" in error.message


async def test_what_a_guest_lists_is_not_read_in_the_event_loop(api: MachineApi, monkeypatch: pytest.MonkeyPatch):
    await api.create()
    await api.files("write_text", path="f", content="x")
    threads = []
    item = operations._item
    monkeypatch.setattr(operations, "_item", lambda entry: (threads.append(threading.current_thread()), item(entry))[1])
    assert (await api.files("list"))["entries"]
    assert threads
    assert threading.main_thread() not in threads


async def test_every_operation_of_the_contract_is_served(api: MachineApi):
    for operation in OPERATIONS:
        decode_body(b'{"operation": "%s"}' % operation.encode(), FilesOperation)
    assert len(OPERATIONS) == 14


# -- visits to the disk of a machine at rest ---------------------------------------------------------------------------


async def test_a_machine_at_rest_stays_at_rest(machine: MachineApi):
    before = (await machine.call("GET", "/machines/m-1"))["machine"]
    await machine.files("write_text", path="f", content="x")
    after = (await machine.call("GET", "/machines/m-1"))["machine"]
    assert after["phase"] == before["phase"]
    assert after["generation"] == before["generation"] == 1


async def test_those_who_come_at_the_same_time_share_one_visit(api: MachineApi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(visitors, "LINGER_S", 30.0)
    await api.create()
    await api.call("POST", "/machines/m-1/stop", status=204)
    await asyncio.gather(*(api.files("write_text", path=f"f{number}", content="x") for number in range(5)))
    await api.files("read_text", path="f3")
    assert api.world.quarters.visits == 1
    usage = await api.daemon.journal.usage()
    assert (usage.active, usage.memory_mib) == (1, 3072)
    # Another order does not wait for visitors who might still come.
    async with asyncio.timeout(20):
        assert (await api.call("POST", "/machines/m-1/start"))["machine"]["phase"] == "running"
    assert len((await api.files("list"))["entries"]) == 5


async def test_a_visit_ends_and_leaves_nothing(api: MachineApi):
    await api.create()
    await api.call("POST", "/machines/m-1/stop", status=204)
    await api.files("write_text", path="f", content="x")
    async with asyncio.timeout(60):
        while await api.daemon.journal.operation("m-1") is not None:
            await asyncio.sleep(0.002)
    usage = await api.daemon.journal.usage()
    assert (usage.active, usage.machines) == (0, 1)
    assert api.world.leftovers == (set(), set(), {"m-1"})


async def test_a_visit_needs_room(api: MachineApi):
    await api.create()
    await api.call("POST", "/machines/m-1/stop", status=204)
    quarters = api.world.quarters
    quarters.limits_now = msgspec.structs.replace(quarters.limits_now, memory_mib=1000)
    assert isinstance(await api.files_fail("list"), HostFull)


async def test_a_visit_whose_guest_does_not_come_says_why(api: MachineApi):
    await api.create()
    await api.call("POST", "/machines/m-1/stop", status=204)
    api.world.driver.boot_error = BootFailed(id="m-1", problem="no kernel")
    assert isinstance(await api.files_fail("list"), BootFailed)
    api.world.driver.boot_error = None
    assert await api.files("list") == {"entries": []}


async def test_a_client_that_leaves_a_visit_leaves_no_vmm(api: MachineApi):
    await api.create()
    await api.call("POST", "/machines/m-1/stop", status=204)
    api.world.driver.holds.hold("agent")
    api.world.driver.holds.reached("agent").clear()
    leaving = asyncio.create_task(api.files("list"))
    await api.world.driver.holds.reached("agent").wait()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    api.world.driver.holds.hold("agent").set()
    async with asyncio.timeout(60):
        while await api.daemon.journal.operation("m-1") is not None:
            await asyncio.sleep(0.002)
    assert api.world.leftovers == (set(), set(), {"m-1"})


async def test_a_command_that_hangs_does_not_keep_files_waiting(api: MachineApi):
    await api.create()
    body = {"command": ["hang"], "timeout_ms": 300_000}
    hanging = asyncio.create_task(api.raw("POST", "/machines/m-1/exec", body))
    agent = api.world.driver.processes["m-1"].agent
    await until(lambda: "POST /exec" in agent.requests)
    async with asyncio.timeout(60):
        assert await api.files("exists", path="x") == {"exists": False}
        assert (await api.call("GET", "/machines/m-1"))["machine"]["phase"] == "running"
        await api.call("DELETE", "/machines/m-1", status=204)
    await hanging


async def test_a_content_that_is_cut_off_does_not_pass_for_whole(api: MachineApi, monkeypatch: pytest.MonkeyPatch):
    async def cut(_reader: Reader) -> AsyncIterator[bytes]:
        yield b"begun"
        raise ConnectionResetError("the VMM has gone")

    await api.create()
    await api.files("write_text", path="f", content="x")
    monkeypatch.setattr(Reader, "chunks", cut)
    with pytest.raises(ConnectionError):
        await api.raw("POST", "/machines/m-1/files/ops", {"operation": "read_bytes", "path": "f"})


async def test_a_delete_ends_a_visit(api: MachineApi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(visitors, "LINGER_S", 30.0)
    await api.create()
    await api.call("POST", "/machines/m-1/stop", status=204)
    await api.files("write_text", path="f", content="x")
    async with asyncio.timeout(20):
        await api.call("DELETE", "/machines/m-1", status=204)
    assert api.world.leftovers == (set(), set(), set())
    assert isinstance(await api.files_fail("list"), MachineNotFound)


async def test_a_machine_that_is_being_made_has_no_files_yet(api: MachineApi):
    gate = api.world.driver.holds.hold("boot")
    creating = asyncio.create_task(api.create())
    await api.world.driver.holds.reached("boot").wait()
    assert (await api.call("GET", "/machines/m-1"))["machine"]["phase"] == "starting"
    api_fails = asyncio.create_task(api.files_fail("list"))
    assert isinstance(await api_fails, WrongState)
    gate.set()
    await creating
