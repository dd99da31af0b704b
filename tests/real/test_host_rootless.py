"""A daemon without root: QEMU's user network, no control groups, no users of their own; the record says so."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_host import Guest, Host, make_fence, until

pytestmark = pytest.mark.real

NOBODY = 65534


@pytest.fixture
def rootless(host: Host, artefacts: Path) -> Host:
    """A host whose daemon runs as nobody, with artefacts of its own (stores are written to)."""
    own = host.folder / "artefacts"
    own.mkdir()
    for name in ("images", "kernels", "initramfs"):
        subprocess.run(["cp", "-r", "--sparse=always", artefacts / name, own], check=True)
    for folder in (host.data, host.run_dir):
        folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", own, host.data, host.run_dir], check=True)
    return host


async def test_the_life_of_a_machine_without_root(rootless: Host):
    host = rootless
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", sys.executable]
    # fmt: off
    argv += [
        "-m", "fusevm.host", "--data-root", str(host.data), "--run-dir", str(host.run_dir),
        "--artefact-root", str(host.folder / "artefacts"), "--listen", "", "--driver", "qemu",
        "--instance", host.instance, "--disk-reserve-bytes", str(1 << 30),
    ]
    # fmt: on
    environment = {**os.environ, "HOME": str(host.data), "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    fence = make_fence()
    guest = Guest(host, "m-1", fence)
    for attempt in range(2):
        with host.log.open("ab") as log:
            host._daemon = subprocess.Popen(host.box.enter(*argv), stdout=log, stderr=log, env=environment)
        await until(host._serves)
        if attempt == 0:
            machine = await host.create("m-1", fence)
            assert (machine.isolation, machine.address) == ("user-network", "")
        assert await guest.shell("id -u; ip -o addr show 2>/dev/null | grep -c 10.208.0.2 || true") != ""
        (line,) = [
            line for line in host.box.run("ps", "-ww", "-eo", "uid=,args=").splitlines() if "qemu-system" in line
        ]
        assert int(line.split()[0]) == NOBODY
        assert "restrict=on" in line
        await until((host.data / "host.json").exists)
        facts = json.loads((host.data / "host.json").read_text())
        assert facts["urls"] == [f"unix://{host.socket}"]
        assert await host.stop() == 0

    with host.log.open("ab") as log:
        host._daemon = subprocess.Popen(host.box.enter(*argv), stdout=log, stderr=log, env=environment)
    await until(host._serves)
    assert (await guest.exec("true")).exit_code == 0
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0
    await asyncio.to_thread(shutil.rmtree, host.folder / "artefacts")
