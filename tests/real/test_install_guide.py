"""docs/install.md, word for word, on a machine with a real systemd: its commands build the program from this checkout
and make a host, a control plane and a machine that lives through an upgrade, and leave nothing at the end.

The machine has no network: Python's packages, images and kernels are where the commands find them.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import systemd_world
from own_world import DATA, machines_network, run_prefix
from systemd_world import ENVIRON, SHARED, World

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "install.md"
CHECKOUT = Path("/srv/fuse")
WHEELS = Path("/srv/wheels")
REQUIREMENTS = [ROOT / "requirements" / name for name in ("run.txt", "build.txt")]
_DONE = "--guide-done--"

pytestmark = [pytest.mark.root, pytest.mark.real, pytest.mark.timeout(1200)]


def sections() -> dict[str, list[str]]:
    """Heading -> its `sh` blocks."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", GUIDE.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        found[heading] = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return {heading: blocks for heading, blocks in found.items() if blocks}


class Shell:
    """One shell in the machine for all sections, as an administrator's; the first failure ends it."""

    def __init__(self, world: World) -> None:
        words = ["nsenter", "-t", str(world.init), "-m", "-p", "-u", "-i", "-n", "-C", "-r", "--", "sh", "-e"]
        environ = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "FUSE_DRIVER": "qemu"}
        environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS), "PIP_CONFIG_FILE": "/dev/null"}
        pipe, output = subprocess.PIPE, subprocess.STDOUT
        self._shell = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=output, text=True, env=environ)
        self.run(f"cd {CHECKOUT}\n")

    def run(self, commands: str) -> str:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{commands}\necho {_DONE}\n")
        self._shell.stdin.flush()
        said = []
        for line in self._shell.stdout:
            if line.strip() == _DONE:
                return "".join(said)
            said.append(line)
        raise AssertionError(f"it failed:\n{commands}\nit said:\n{''.join(said)}")

    def close(self) -> None:
        self._shell.kill()
        self._shell.communicate()


@pytest.fixture
def wheels() -> Path:
    """The packages that the program is built from and needs, with the hashes that it wants; found, else fetched."""
    ask = ["python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.run(ask, env=ENVIRON, capture_output=True, text=True, check=True).stdout.strip()
    digest = hashlib.sha256(b"".join([version.encode(), *(file.read_bytes() for file in REQUIREMENTS)])).hexdigest()[
        :12
    ]
    folder = DATA / f"wheels-{digest}"
    if not folder.exists():
        new = DATA / f"{folder.name}.{os.getpid()}"
        named = [word for file in REQUIREMENTS for word in ("-r", str(file))]
        words = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--require-hashes",
            "--only-binary=:all:",
            "-d",
            str(new),
        ]
        with machines_network():
            subprocess.run([*words, *named], check=True)
        new.rename(folder)
    return folder


@pytest.fixture
def world(artefacts: Path, wheels: Path, tmp_path: Path) -> Iterator[World]:
    with systemd_world.running(tmp_path, f"{run_prefix()}guide", artefacts) as world:
        shutil.rmtree(world.path("/opt/fuse"))
        # What takes the Internet and minutes: images and kernels. The rest of it is made by the commands.
        world.run("mkdir", "-p", "/var/lib/fuse", "/root")
        parts = "--exclude=.build-* images kernels initramfs"
        world.run("sh", "-c", f"tar -c -S -C {SHARED} {parts} | tar -x -C /var/lib/fuse")
        shutil.copytree(wheels, world.path(WHEELS))
        shutil.copytree(ROOT, world.path(CHECKOUT), symlinks=True, ignore=_not_sources)
        yield world


def _not_sources(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in (".git", ".venv", ".cache", "__pycache__") or name.startswith("fused-")]


def change_sources(world: World) -> None:
    """Let the checkout be another version of the program."""
    with world.path(CHECKOUT / "src" / "fusevm" / "__init__.py").open("a") as file:
        file.write("\n# newer\n")


def test_the_guide_leads_from_a_bare_server_to_a_machine_and_back(world: World):
    blocks = sections()
    assert [heading[0] for heading in blocks] == ["1", "2", "3", "4", "5", "6"]
    host, control, machine, upgrade, logs, (removal, again) = blocks.values()
    shell = Shell(world)
    try:
        said = "".join(map(shell.run, host))
        assert "FIRECRACKER_BASE_URL=https://127.0.0.1:8090\nFIRECRACKER_TOKEN=" in said
        assert "nothing is to be done" in said
        assert "unfit" not in said
        assert "default" in "".join(map(shell.run, control))
        assert "Linux" in "".join(map(shell.run, machine))

        (vmm,) = world.run("pgrep", "-f", "qemu-system").stdout.split()
        daemon, old = world.show("fuse-host", "MainPID"), world.path("/usr/local/bin/fuse").readlink()
        change_sources(world)
        for block in upgrade:
            shell.run(block)
        assert world.run("pgrep", "-f", "qemu-system").stdout.split() == [vmm]
        assert world.show("fuse-host", "MainPID") != daemon
        new = world.path("/usr/local/bin/fuse").readlink()
        assert new != old
        assert world.path(new.parents[1] / "lib").exists()
        assert not world.exists(old.parents[1])

        said = "".join(map(shell.run, logs))
        assert "fuse-host" in said
        assert '"event": "ready"' in said
        shell.run(removal)
        assert not world.exists("/etc/systemd/system/fuse-host.service")
        assert world.exists("/var/lib/fuse/host/token")
        shell.run(again)
    finally:
        shell.close()
    for path in ("/etc/fuse", "/var/lib/fuse", "/run/fuse", "/usr/local/bin/fuse", "/opt/fuse"):
        assert not world.exists(path), path
    assert world.run("pgrep", "-f", "qemu-system", check=False).stdout == ""
