"""A daemon finds what nobody owns (processes, control groups, slots, directories) and removes it, and nothing else."""

import json
import subprocess
import sys

import pytest
from real_host import Host, make_fence, until

pytestmark = pytest.mark.real


def _plant(host: Host, machine_id: str) -> subprocess.Popen[bytes]:
    """Everything that a machine without a record could leave, and things that only look like it."""
    folder = host.data / "machines" / machine_id
    folder.mkdir(parents=True)
    (folder / "overlay.qcow2").write_bytes(b"x" * 5000)
    (host.run_dir / machine_id).mkdir(parents=True, exist_ok=True)
    for root in host._cgroups().roots():
        (root / host.instance / "machines" / machine_id).mkdir(parents=True, exist_ok=True)
    host.box.run("ip", "netns", "add", f"{host.instance}-7")
    host.box.run("ip", "link", "add", f"{host.instance}-v7", "type", "veth", "peer", "name", "other0")
    words = host.box.enter("sh", "-c", "sleep 1000; true", machine_id, f"{folder}/overlay.qcow2")
    return subprocess.Popen(words)


async def test_leftovers_are_removed_at_the_start(host: Host):
    stray = _plant(host, "m-lost")
    bystander = subprocess.Popen(host.box.enter("sleep", "1000"))
    try:
        await until(lambda: any(line.startswith("process") for line in host.leftovers()))
        await host.start()
        await until(lambda: host.leftovers() == [])
        assert stray.wait(10) != 0
        assert bystander.poll() is None
        metrics = (await host.ask("GET", "/metrics")).decode()
        for kind in ("process", "cgroup", "machine directory", "run directory", "slot"):
            assert f'fuse_host_leftovers_removed_total{{kind="{kind}"}} 1.0' in metrics or kind == "slot", kind
        assert "leftover_removed" in host.tail()
    finally:
        bystander.kill()
        bystander.wait()
    assert await host.stop() == 0


async def test_leftovers_that_appear_later_are_removed_by_the_sweep(host: Host):
    await host.start()
    stray = _plant(host, "m-late")
    await until(lambda: host.leftovers() == [], 120)
    assert stray.wait(10) != 0
    assert await host.stop() == 0


async def test_a_sweep_leaves_machines_alone_and_state_says_what_is_there(host: Host):
    await host.start()
    await host.create("m-1", make_fence())
    stray = _plant(host, "m-lost")
    await until(lambda: not any("m-lost" in line for line in host.leftovers()), 120)
    stray.wait(10)
    state = json.loads(await host.ask("GET", "/state"))
    assert state["observed"]["phases"] == {"m-1": "running"}
    assert state["observed"]["quarantine"] == {}

    async def is_whole() -> bool:
        observed = json.loads(await host.ask("GET", "/state"))["observed"]
        return observed["drift"] == {"leftovers": [], "surplus": [], "missing": []}

    # Of a real machine, sweeps find everything, of every kind: after two more of them nothing is missed.
    (host.run_dir / "m-again").mkdir()
    await until(lambda: not (host.run_dir / "m-again").exists())
    await until(is_whole)
    assert {row["kind"] for row in state["journal"]["reservations"]} == {"slot", "uid"}
    assert (await host.machine("m-1")).phase == "running"
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0


async def test_the_listeners_say_where_they_are_and_who_may_come_in(host: Host):
    await host.start()
    await until((host.data / "host.json").exists)
    announced = json.loads((host.data / "host.json").read_text())
    assert announced["urls"][0] == f"unix://{host.socket}"
    assert announced["urls"][1].startswith("https://127.0.0.1:")
    token = (host.data / "token").read_text().strip()
    assert token.endswith(announced["pin"])
    port = announced["urls"][1].rpartition(":")[2]
    probe = (
        "import asyncio, ssl, sys\n"
        "from fusevm.wire.http1 import Connection\n"
        "from fusevm.wire.pin import parse_host_token, spki_sha256\n"
        "from fusevm.wire.streams import open_tcp\n"
        "async def main():\n"
        "    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)\n"
        "    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE\n"
        "    secret, pin = parse_host_token(sys.argv[2])\n"
        "    for headers in ({}, {'authorization': 'Bearer ' + secret}):\n"
        "        stream = await open_tcp('127.0.0.1', int(sys.argv[1]), tls)\n"
        "        assert spki_sha256(stream.peer_certificate) == pin\n"
        "        print((await Connection(stream).request('GET', '/info', headers=headers)).status)\n"
        "        await stream.close()\n"
        "asyncio.run(main())\n"
    )
    assert host.box.run(sys.executable, "-c", probe, port, token).split() == ["401", "200"]
    assert await host.stop() == 0
    assert not host.socket.exists()
    assert not (host.data / "host.json").exists()
