"""The host daemon of the release before, as it finds this release's agent: its own code, run against the real one."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_process import RealAgent, run_agent

from fusevm.host.images.initramfs import agent_path
from fusevm.model.errors import VmmMissing
from previous_agent import NotAvailable, previous_daemon

#: What that daemon does with a guest, but for `configure`, which would set the clock of this machine.
OLD = """
import asyncio, json, sys
from fusevm.host.agent import Conversation, ask_health, decode_output, is_compatible, run_command
from fusevm.model.errors import Error
from fusevm.wire.guest import ExecRequest
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import open_unix

class Guest:
    async def open_stream(self):
        return await open_unix(sys.argv[1])

async def main():
    guest = Guest()
    health = await ask_health(guest)
    ran = await run_command(guest, ExecRequest(shell="printf out; printf err >&2; exit 3"))
    try:
        refused = await run_command(guest, ExecRequest(cmd=["/no/such/program"]))
    except Error as error:
        refused = type(error).__name__
    path = sys.argv[2]
    connection = Connection(await guest.open_stream())
    written = await (await connection.request("PUT", f"/files?path={path}", body=b"contents")).read(1000)
    read = await (await connection.request("GET", f"/files?path={path}")).read(1000)
    await connection.close()
    print(json.dumps({
        "compatible": is_compatible(health.protocol), "exit": ran.exit_code,
        "output": [text.decode() for text in decode_output(ran)], "refused": refused,
        "size": json.loads(written)["size_bytes"], "read": read.decode(),
    }))

asyncio.run(main())
"""


@pytest.fixture
async def machine() -> AsyncIterator[RealAgent]:
    try:
        program = agent_path()
    except VmmMissing as error:
        pytest.skip(str(error))
    async with run_agent(program) as agent:
        (agent.root / "disk").mkdir()
        yield agent


async def test_the_previous_daemon_works_with_this_agent(machine: RealAgent, tmp_path: Path) -> None:
    try:
        source = previous_daemon(tmp_path)
    except NotAvailable as error:
        pytest.skip(str(error))
    environ = {**os.environ, "PYTHONPATH": str(source)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        OLD,
        machine.root / "socket",
        machine.root / "disk" / "file",
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, problem = await process.communicate()
    assert process.returncode == 0, problem.decode()
    assert json.loads(said) == {
        "compatible": True,
        "exit": 3,
        "output": ["out", "err"],
        "refused": "CommandNotFound",
        "size": 8,
        "read": "contents",
    }
