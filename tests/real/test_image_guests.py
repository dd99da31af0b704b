"""Machines of images that were pulled from a real registry, or built from a recipe."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_host import Box, Guest, Host, make_fence, reason_of, stdout_of

from fusevm.host.images.pull import pull_image
from fusevm.host.images.recipe import build_recipe
from fusevm.host.images.store import ImageStore
from image_factory import ImageFiles, entry, folder, make_tar, symlink
from oci_registry import MISSING, registry
from own_world import DATA, machines_network, run_prefix

pytestmark = pytest.mark.real

FENCE = make_fence()
BUSYBOX = Path("/bin/busybox")
RECIPE = """
from = "debian-12"
packages = ["jq"]
steps = ["useradd --uid 1234 --create-home app", "jq --null-input '1 + 1' > /opt/two"]
[[files]]
source = "greeting"
target = "/opt/app/greeting"
owner = "1234:1234"
[[binaries]]
source = "tool"
target = "/usr/local/bin/tool"
[config]
env = { PORT = "80" }
workdir = "/opt/app"
user = "app"
entrypoint = ["/usr/local/bin/tool"]
cmd = ["greeting"]
"""


@pytest.fixture
def artefact_root(artefacts: Path) -> Iterator[Path]:
    """A folder for images, with the kernel and the initramfs of all tests."""
    root = Path(tempfile.mkdtemp(prefix="fuse-pulled-", dir="/var/tmp"))
    root.chmod(0o755)
    for name in ("kernels", "initramfs", "blanks"):
        (root / name).symlink_to(artefacts / name)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def pulled_host(artefact_root: Path) -> Iterator[Host]:
    """A host for machines of the images there."""
    host = Host(Box(), artefact_root, f"{run_prefix()}p")
    yield host
    host.close()


def busybox_image() -> ImageFiles:
    """A shell and some tools, a user, and what the second layer takes away."""
    applets = [symlink(f"bin/{name}", "busybox") for name in ("sh", "id", "cat", "ls", "stat", "pwd", "env")]
    lower = make_tar(
        folder("bin"),
        entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
        *applets,
        folder("etc"),
        entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/home/app:/bin/sh\n"),
        entry("etc/gone", b"gone"),
    )
    upper = make_tar(
        entry("etc/.wh.gone"), folder("srv", uid=1234, gid=1235), entry("srv/file", b"kept", mode=0o640, uid=1234)
    )
    return ImageFiles(
        lower,
        upper,
        Env=["PORT=80", "PATH=/bin"],
        User="app",
        WorkingDir="/srv",
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["echo $PORT $(id -u):$(id -g) $(pwd)"],
    )


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed")
async def test_a_machine_of_a_pulled_image_is_what_the_image_says(
    tmp_path: Path, artefact_root: Path, pulled_host: Host
):
    with registry(tmp_path / "hub") as hub:
        hub.push(busybox_image().write_layout(tmp_path / "layout"), "busy:1")
        image = await pull_image(ImageStore(artefact_root), f"{hub.address}/busy:1", name="busy:1")
    host = pulled_host
    await host.start()
    assert await reason_of(host.create("m-0", make_fence("u0"), image="busy:2")) == "image_not_found"
    await host.create("m-1", FENCE, image="busy:1", memory_mib=128)
    guest = Guest(host, "m-1", FENCE)
    # Environment, user and directory are the image's, and so is what runs when nothing else is said.
    assert stdout_of(await guest.exec(image_command=True)) == b"80 1234:1235 /srv\n"
    assert await guest.shell("id -u; pwd; ls /etc/passwd /etc/gone || true") == "1234\n/srv\n/etc/passwd\n"
    assert await guest.shell("stat -c '%a %u %g %s' /srv/file /bin/busybox") == (
        f"640 1234 0 4\n755 0 0 {BUSYBOX.stat().st_size}\n"
    )
    # What a request says has the last word.
    said = await guest.exec("/bin/sh", "-c", "echo $PORT $(id -u) $(pwd)", env={"PORT": "81"}, user="0", cwd="/etc")
    assert stdout_of(said) == b"81 0 /etc\n"
    assert await reason_of(host.ask("DELETE", "/images/busy:1")) == "image_in_use"
    await host.delete("m-1", make_fence(action_seq=2))
    await host.ask("DELETE", "/images/busy:1")
    assert await ImageStore(artefact_root).find(image.digest) is None
    assert await host.stop() == 0


async def test_a_machine_of_a_recipe_is_what_the_recipe_says(tmp_path: Path, artefacts: Path, host: Host):
    (tmp_path / "greeting").write_text("hello from a recipe\n")
    (tmp_path / "tool").write_text('#!/bin/sh\necho "$PORT $(id -un) $(cat "$1") $(cat /opt/two)"\n')
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with machines_network():  # packages come from the machine's mirrors, once
        built = await build_recipe(ImageStore(DATA), tmp_path / "recipe.toml", name="test-recipe")
    assert built.image.config.cmd == ("greeting",)
    await host.start()
    await host.create("m-1", FENCE, image="test-recipe")
    guest = Guest(host, "m-1", FENCE)
    assert stdout_of(await guest.exec(image_command=True)) == b"80 app hello from a recipe 2\n"
    assert await guest.shell("stat -c '%U %a' greeting /usr/local/bin/tool; jq --version | cut -c1-2") == (
        "app 644\nroot 755\njq\n"
    )
    await host.delete("m-1", make_fence(action_seq=2))
    assert await host.stop() == 0
