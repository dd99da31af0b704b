"""What the real agent refuses, as the class that it is raised as everywhere else."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from agent_client import AgentClient
from agent_process import RealAgent, run_agent

from fusevm.host.images.initramfs import agent_path
from fusevm.model.errors import (
    BadCwd,
    BadPath,
    BadRequest,
    CommandNotFound,
    DirectoryNotEmpty,
    Error,
    FileExists,
    FileNotFound,
    IsADirectory,
    NotADirectory,
    PermissionDenied,
    ProcessNotFound,
    StdinClosed,
    UnknownSignal,
    UnknownUser,
    VmmMissing,
)
from fusevm.wire.guest import ExecRequest, Process


@pytest.fixture
async def machine() -> AsyncIterator[RealAgent]:
    try:
        program = agent_path()
    except VmmMissing as error:
        pytest.skip(str(error))
    async with run_agent(program) as agent:
        (agent.root / "disk" / "full").mkdir(parents=True)
        (agent.root / "disk" / "full" / "file").write_text("contents")
        yield agent


async def _refusal(machine: RealAgent, method: str, target: str, body: Any = None) -> Error:
    with pytest.raises(Error) as caught:
        await AgentClient(machine).call(method, target, body)
    return caught.value


@pytest.mark.parametrize(
    ("operation", "body", "expected"),
    [
        ("stat", {"path": "{disk}/nothing"}, FileNotFound),
        ("list", {"path": "{disk}/full/file"}, NotADirectory),
        ("stat", {"path": "{disk}/full/file/below"}, NotADirectory),
        ("remove", {"path": "{disk}/full"}, DirectoryNotEmpty),
        ("mkdir", {"path": "{disk}/full", "parents": False}, FileExists),
        ("mkdir", {"path": "/sys/kernel/fuse-test", "parents": False}, PermissionDenied),
        ("stat", {"path": "relative"}, BadPath),
    ],
)
async def test_paths_that_do_not_fit(
    machine: RealAgent, operation: str, body: dict[str, Any], expected: type[Error]
) -> None:
    body = body | {"path": body["path"].format(disk=machine.root / "disk")}
    assert type(await _refusal(machine, "POST", f"/files?op={operation}", body)) is expected


async def test_a_directory_is_no_file(machine: RealAgent) -> None:
    assert type(await _refusal(machine, "GET", f"/files?path={machine.path('full')}")) is IsADirectory


async def test_commands_that_cannot_start(machine: RealAgent) -> None:
    nowhere = machine.path("nowhere")
    for request, expected in (
        (ExecRequest(cmd=["/no/such/program"]), CommandNotFound),
        (ExecRequest(cmd=["true"], cwd=nowhere), BadCwd),
        (ExecRequest(cmd=["true"], user="nobody-of-that-name"), UnknownUser),
        # An image without a command of its own, and two commands at once: `fuse run` tells them from real failures.
        (ExecRequest(image_command=True), BadRequest),
        (ExecRequest(image_command=True, cmd=["true"]), BadRequest),
    ):
        assert type(await _refusal(machine, "POST", "/exec", request)) is expected


async def test_processes_that_cannot_be_acted_on(machine: RealAgent) -> None:
    client = AgentClient(machine)
    process = await client.ask("POST", "/processes", Process, ExecRequest(cmd=["sleep", "1000"]))
    place = f"/processes/{process.pid}"
    assert type(await _refusal(machine, "POST", f"{place}/signal", {"signal": "PLEASE"})) is UnknownSignal
    assert type(await _refusal(machine, "POST", f"{place}/stdin", {})) is StdinClosed
    assert type(await _refusal(machine, "GET", "/processes/999999")) is ProcessNotFound
    await client.call("POST", f"{place}/signal", {"signal": "KILL"})
