"""computer-host's machine API with a real guest: logging in by the key that was promised, and a disk that grows."""

import asyncio
import base64
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from real_host import Host, until

from artefacts import IMAGE

pytestmark = pytest.mark.timeout(900)

ID = "m-api"
_SSH = (
    *("-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=60"),
    *("-o", "GlobalKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes", "-o", "ConnectionAttempts=30"),
)


async def ask(host: Host, method: str, path: str, body: Any = None) -> Any:
    content = await host.ask(method, path, None, None if body is None else json.dumps(body).encode())
    return json.loads(content) if content else None


async def files(host: Host, operation: str, **fields: Any) -> Any:
    return await ask(host, "POST", f"/machines/{ID}/files/ops", {"operation": operation, **fields})


async def shell(host: Host, text: str, user: str = "root") -> str:
    body = {"command": ["sh", "-c", text], "user": user, "timeout_ms": 120_000}
    answer = await ask(host, "POST", f"/machines/{ID}/exec", body)
    assert answer["exit_code"] == 0, answer
    return answer["stdout"]


async def run(*words: str) -> str:
    """A program of this machine that must succeed."""
    program = await asyncio.create_subprocess_exec(*words, stdout=-1, stderr=-1)
    out, err = await program.communicate()
    assert program.returncode == 0, (shlex.join(words), out, err)
    return out.decode()


class Client:
    """Somebody with a key, who knows the machine by the one that the API has told."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.key = folder / "id"
        self.known = folder / "known_hosts"

    async def make_key(self) -> str:
        await run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "somebody", "-f", str(self.key))
        return self.key.with_suffix(".pub").read_text().strip()

    async def sign(self, other: "Client", name: str) -> None:
        """As an authority: the other's key is that of the user `name`."""
        words = ["-q", "-s", str(self.key), "-I", "somebody", "-n", name, str(other.key.with_suffix(".pub"))]
        await run("ssh-keygen", *words)

    async def log_in(self, host: Host, machine: dict[str, Any], *command: str, user: str = "node") -> str:
        """Run a command by SSH through the relay, which is in the daemon's own network namespace."""
        (port,) = (port["host_port"] for port in machine["ports"] if port["name"] == "ssh")
        self.known.write_text(f"[127.0.0.1]:{port} {machine['guest_ssh_host_public_key']}\n")
        options = [*_SSH, "-o", f"UserKnownHostsFile={self.known}", "-i", str(self.key), "-p", str(port)]
        return await run(*host.box.enter("ssh", *options, f"{user}@127.0.0.1", *command))


async def test_a_machine_is_logged_in_to_and_keeps_its_disk_and_key(host: Host, tmp_path: Path):
    client, authority, signed = (Client(tmp_path / name) for name in ("client", "authority", "signed"))
    await host.start()
    keys, authorities = [await client.make_key()], [await authority.make_key()]
    await signed.make_key()
    guest = {"hostname": "box", "authorized_keys": keys, "trusted_user_ca_keys": authorities}
    body = {
        "machine_id": ID,
        "image": IMAGE,
        "memory_mib": 256,
        "storage_bytes": 256 << 20,
        "guest_config": guest,
    }
    machine = (await ask(host, "POST", "/machines", body))["machine"]
    assert machine["phase"] == "running", machine["error"]

    # The real client takes the pinned key and no other.
    assert await client.log_in(host, machine, "id -un; hostname; pwd") == "node\nbox\n/home/node\n"
    assert (await client.log_in(host, machine, "id -u", user="root")).strip() == "0"
    # Nobody else's key opens it, until an authority that it trusts says whose the key is.
    with pytest.raises(AssertionError, match="Permission denied"):
        await signed.log_in(host, machine, "true")
    await authority.sign(signed, "node")
    assert await signed.log_in(host, machine, "id -un") == "node\n"
    other = {**machine, "guest_ssh_host_public_key": client.key.with_suffix(".pub").read_text().strip()}
    with pytest.raises(AssertionError, match=r"[Hh]ost key"):
        await client.log_in(host, other, "true")

    # What is written by each of them is there for the others.
    await files(host, "write_text", path="src/a.txt", content="by the API\n")
    assert await client.log_in(host, machine, "cat workspace/src/a.txt") == "by the API\n"
    await client.log_in(host, machine, "echo by ssh > workspace/b.txt")
    assert await shell(host, "stat -c %U:%a /home/node/workspace/src/a.txt") == "node:644\n"
    running = [await answers(host), await files(host, "grep", pattern="by")]

    # The same answers from a machine at rest, whose disk has grown meanwhile.
    size = int(await shell(host, "df --output=size -B1 / | tail -1"))
    resized = (await ask(host, "POST", f"/machines/{ID}/resize", {"storage_bytes": 512 << 20}))["machine"]
    assert resized["phase"] == "stopped"
    assert [await answers(host), await files(host, "grep", pattern="by")] == running
    await files(host, "write_range", path="b.txt", offset=3, content_base64=base64.b64encode(b"API").decode())
    assert (await ask(host, "GET", f"/machines/{ID}"))["machine"]["phase"] == "stopped"

    again = (await ask(host, "POST", f"/machines/{ID}/start"))["machine"]
    assert again["guest_ssh_host_public_key"] == machine["guest_ssh_host_public_key"]
    assert await client.log_in(host, again, "cat workspace/b.txt") == "by API\n"
    assert int(await shell(host, "df --output=size -B1 / | tail -1")) > size + (200 << 20)

    # A machine that was cut off keeps what it had synced; its own agent repairs the rest.
    await shell(host, "echo kept > /home/node/workspace/c.txt; sync; head -c 1M /dev/urandom > /home/node/workspace/d")
    (vmm,) = (line.split()[1] for line in host.leftovers() if line.startswith("process") and "qemu-system" in line)
    host.box.run("kill", "-9", vmm)

    async def has_failed() -> bool:
        return (await ask(host, "GET", f"/machines/{ID}"))["machine"]["phase"] == "failed"

    await until(has_failed)
    assert await files(host, "read_text", path="c.txt") == {"content": "kept\n"}
    await host.delete(ID, None)


async def answers(host: Host) -> list[Any]:
    """What the reading operations say of the same files."""
    return [
        await files(host, "list", recursive=True),
        await files(host, "stat", path="src/a.txt"),
        await files(host, "exists", path="none"),
        await files(host, "read_text", path="src/a.txt"),
        await files(host, "read_bytes", path="b.txt"),
        await files(host, "read_range", path="b.txt", offset=3, length=2),
    ]
