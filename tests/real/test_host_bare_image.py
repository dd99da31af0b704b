"""A machine of an image that is one static program: no shell, no Python, no /etc/passwd."""

import json
import os
from urllib.parse import quote

import msgspec
import pytest
from real_host import Guest, Host, make_fence, stdout_of

from fusevm.model.errors import CommandNotFound, UnknownUser
from fusevm.wire.guest import AgentHealth, ExecRequest, ExecResult

pytestmark = pytest.mark.real

FENCE = make_fence()
#: What exists of programs and users in the machine.
_ABSENT = ("/bin/sh", "/bin/bash", "/usr/bin/python3", "/etc/passwd", "/etc/group", "/usr")


async def test_everything_that_needs_nothing_of_the_image_works(bare_host: Host):
    host = bare_host
    await host.start()
    machine = await host.create("m-1", FENCE, image="bare", memory_mib=128)
    assert machine.phase == "running"
    guest = Guest(host, "m-1", FENCE)
    health = msgspec.json.decode(await guest.ask("GET", "/health"), type=AgentHealth)
    assert health.ok

    # Commands by words: with an absolute path, by PATH, with what they wrote and how they ended.
    for word in ("/bin/tool", "tool"):
        result = await guest.exec(word, "version")
        assert (result.exit_code, stdout_of(result).strip() != b"") == (0, True)
    failed = await guest.exec("tool", "nonsense")
    assert (failed.exit_code, stdout_of(failed)) == (1, b"")
    # A user by number needs no /etc/passwd, one by name cannot be.
    assert (await guest.exec("tool", "version", user="1234")).exit_code == 0
    assert (await guest.exec("tool", "version", user="1234:56")).exit_code == 0
    with pytest.raises(UnknownUser):
        await guest.exec("tool", "version", user="nobody")

    # What needs a shell says that there is none.
    body = msgspec.json.encode(ExecRequest(shell="echo hello"))
    with pytest.raises(CommandNotFound):
        msgspec.json.decode(await guest.ask("POST", "/exec", body), type=ExecResult)
    with pytest.raises(CommandNotFound):
        await guest.exec("python3", "-c", "1")

    # Files go in and come out.
    data = os.urandom(300_000)
    await guest.ask("PUT", f"/files?path={quote('/data/deep/file')}", data)
    assert await guest.ask("GET", "/files?path=/data/deep/file") == data
    for path in _ABSENT:
        status, _ = await host.call("HEAD", guest.path(f"/files?path={path}"), FENCE)
        assert status == 404, path
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_the_contracts_machines_need_nothing_of_the_image_either(bare_host: Host):
    """Its user is made, its keys are there; nobody listens for them, since the image has no sshd."""
    host = bare_host
    await host.start()
    body = {"machine_id": "m-1", "image": "bare", "memory_mib": 128, "storage_bytes": 64 << 20}
    made = json.loads(await host.ask("POST", "/machines", None, json.dumps(body).encode()))["machine"]
    assert made["phase"] == "running", made["error"]
    command = json.dumps({"command": ["tool", "version"]}).encode()
    answer = json.loads(await host.ask("POST", "/machines/m-1/exec", None, command))
    assert answer["exit_code"] == 0
    operation = json.dumps({"operation": "write_text", "path": "f", "content": "x"}).encode()
    await host.ask("POST", "/machines/m-1/files/ops", None, operation)
    key = await host.ask("GET", "/machines/m-1/guest/files?path=/etc/ssh/ssh_host_ed25519_key.pub")
    assert key.decode().strip() == made["guest_ssh_host_public_key"]
    await host.delete("m-1", None)
    assert await host.stop() == 0
