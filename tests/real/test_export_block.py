"""computer-host's export block and its lines for curl, as docs/machine-api.md has them: a daemon that is started with
these variables, and a real guest made of an artifact that it fetches."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_host import ROOT, Box, Host, until

from artefacts import IMAGE
from fusevm.host.images.initramfs import agent_path
from fusevm.host.images.store import ImageStore
from fusevm.testing.fake_firecracker.install import install
from own_world import run_prefix

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]
ELSEWHERE = "https://images.example"


def block() -> tuple[list[str], list[str]]:
    """The lines that set variables, and the commands."""
    text = (ROOT / "docs" / "machine-api.md").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.split("## Reaching it")[1].split("\n## ")[0].splitlines()]
    return [line for line in lines if line.startswith("export ")], [line for line in lines if line.startswith("curl ")]


class Exported(Host):
    """A host whose daemons are told by variables alone."""

    variables: dict[str, str]

    def launch(self, *more: str, fault: str = "") -> None:
        """`fuse host serve`, with nothing else."""
        words = ["env", "-i", *(f"{name}={value}" for name, value in self.variables.items())]
        argv = self.box.enter(*words, sys.executable, "-m", "fusevm", "host", "serve", *more)
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(argv, stdout=log, stderr=log)


@pytest.fixture
def host(artefacts: Path) -> Iterator[Exported]:
    """One without a daemon, in a box of its own."""
    host = Exported(Box(), artefacts, f"{run_prefix()}x")
    try:
        yield host
    finally:
        host.close()


async def test_the_export_block_and_the_lines_for_curl_work_as_they_stand(
    host: Exported, artefacts: Path, tmp_path: Path
):
    exports, commands = block()
    assert [re.split("[ =]", line)[1] for line in exports] == [
        "FIRECRACKER_HOST_ROOT_DIR",
        "FIRECRACKER_BINARY_PATH",
        "JAILER_BINARY_PATH",
        "FIRECRACKER_HOST_EGRESS_INTERFACE",
    ]
    programs, own = host.folder / "bin", host.folder / "artefacts"
    programs.mkdir()
    install(programs, agent_path(), guests="qemu")
    own.mkdir()
    for name in ("kernels", "initramfs"):
        shutil.copytree(artefacts / name, own / name, symlinks=True)
    host.box.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "isp0")
    host.box.run("ip", "link", "set", "eth0", "up")

    def here(line: str) -> str:
        return line.replace("/var/lib/firecracker-host", str(host.data)).replace("/usr/local/bin", str(programs))

    # What keeps this run apart from others on the machine, where its kernels are, and whom it may ask.
    apart = {"FUSE_INSTANCE": host.instance, "FUSE_RUN_DIR": str(host.run_dir), "FUSE_HOST_LISTEN": "127.0.0.1:0"}
    apart |= {"FUSE_ARTEFACT_ROOT": str(own), "FUSE_ARTIFACT_NETWORKS": "127.0.0.0/8"}
    own_path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")}
    said = dict(here(line).removeprefix("export ").split("=", 1) for line in exports)
    host.variables = {**own_path, **said, **apart}
    await host.start()

    def curl(line: str, url: str) -> str:
        script = "\n".join([*map(here, exports), f"{line.replace(ELSEWHERE, url)} -sS --fail-with-body"])
        return host.box.run("sh", "-ec", script)

    image = await ImageStore(artefacts).find(IMAGE)
    assert image is not None
    async with host.box.serve(image.rootfs.parent) as url:
        health, made, listed, ran, report, gone = [curl(line, url) for line in commands]
    assert json.loads(health) == {"ok": True}
    machine = json.loads(made)["machine"]
    assert (machine["id"], machine["phase"], machine["artifact"]["rootfs_url"]) == (
        "m-1",
        "running",
        f"{url}/rootfs.ext4",
    )
    assert [one["id"] for one in json.loads(listed)["machines"]] == ["m-1"]
    assert (json.loads(ran)["exit_code"], json.loads(ran)["stdout"]) == (0, "Linux\n")
    assert json.loads(report)["report"]["machines"][0]["machine_id"] == "m-1"
    assert gone == ""
    # The network slots that a daemon keeps ready go with the box.
    of_machines = ("process", "cgroup", "machine")
    await until(lambda: not [what for what in host.leftovers() if what.startswith(of_machines)])
    assert await host.stop() == 0
