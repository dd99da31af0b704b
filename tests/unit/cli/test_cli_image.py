"""`fuse image pull`, `rm`, `gc`, `build -f`."""

import asyncio
import json
import shutil
from pathlib import Path

import msgspec
import pytest
from cli_outcome import Fuse

from fusevm.cli.image_pull import credential_files, default_name, split_local
from fusevm.testing.host_world import SPEC, World, fence, order
from image_factory import ImageFiles, entry, make_tar

pytestmark = pytest.mark.skipif(shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin") is None, reason="no mke2fs")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    files = ImageFiles(make_tar(entry("bin/tool", b"x")), Entrypoint=["/bin/tool"], Cmd=["go"])
    return files.write_layout(tmp_path / "tool", tag="1")


def test_an_image_of_local_files_is_pulled_listed_and_removed(fuse: Fuse, tmp_path: Path, layout: Path) -> None:
    data = str(tmp_path / "data")
    done = fuse("image", "pull", f"oci:{layout}:1", "--data", data)
    assert done.code == 0, done.err
    again = fuse("image", "pull", str(layout), "--name", "other", "--data", data, "-o", "json")
    assert json.loads(again.out)["names"] == ["other", "tool:1"]
    listed = json.loads(fuse("image", "list", "--data", data, "-o", "json").out)
    assert (listed[0]["digest"], listed[0]["origin"]) == (done.out.strip(), "pulled")
    assert (listed[0]["config"]["entrypoint"], listed[0]["config"]["cmd"]) == (["/bin/tool"], ["go"])

    assert fuse("image", "gc", "--data", data).err.strip().endswith("nothing to remove")
    removed = fuse("image", "rm", "tool:1", "--data", data)
    assert (removed.code, removed.out.strip()) == (0, "tool:1")
    removed = fuse("image", "rm", "other", "--data", data, "-o", "json")
    assert json.loads(removed.out)[0]["freed_bytes"] > 0
    gone = fuse("image", "rm", "other", "--data", data)
    assert gone.code != 0
    assert "there are: none" in gone.err
    assert json.loads(fuse("image", "list", "--data", data, "-o", "json").out) == []


def test_what_a_machine_needs_stays_also_without_a_daemon(fuse: Fuse, tmp_path: Path, layout: Path) -> None:
    data = tmp_path / "data"
    digest = fuse("image", "pull", str(layout), "--data", str(data)).out.strip()

    asyncio.run(make_machine_of(tmp_path, digest))
    (data / "host").symlink_to(tmp_path / "world" / "data")
    done = fuse("image", "rm", "tool", "--data", str(data))
    assert done.code != 0
    assert "machine m-1" in done.err
    assert fuse("image", "gc", "--all", "--data", str(data)).code == 0
    assert json.loads(fuse("image", "list", "--data", str(data), "-o", "json").out)[0]["digest"] == digest


async def make_machine_of(tmp_path: Path, digest: str) -> None:
    """A machine in a journal; the fake quarters take every name for a digest."""
    world = World(tmp_path / "world")
    async with world.daemon() as daemon:
        spec = msgspec.structs.replace(SPEC, image=digest.removeprefix("sha256:"))
        await daemon.machines.create(order(spec=spec), fence())


def test_a_recipe_is_built(fuse: Fuse, tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"x")
    recipe = tmp_path / "mine.toml"
    recipe.write_text('from = "scratch"\n[[binaries]]\nsource = "tool"\ntarget = "/bin/tool"\n')
    done = fuse("image", "build", "-f", str(recipe), "--data", str(tmp_path / "data"), "-o", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["names"] == ["mine"]
    for arguments in (["build"], ["build", "-f", str(recipe), "--from", str(tmp_path)]):
        assert fuse("image", *arguments, "--data", str(tmp_path / "data")).code == 2


@pytest.mark.parametrize(
    ("reference", "words"),
    [("Bad Name", "is no image reference"), ("/nowhere.tar", "no such directory"), ("oci:/nowhere:1", "no such")],
)
def test_what_cannot_be_pulled_says_why(fuse: Fuse, tmp_path: Path, reference: str, words: str) -> None:
    done = fuse("image", "pull", reference, "--data", str(tmp_path / "data"))
    assert done.code != 0
    assert words in done.err


def test_local_files_are_told_from_registries() -> None:
    assert split_local("debian:12") is None
    assert split_local("localhost:5000/x") is None
    assert split_local("oci:dir:v1") == (Path("dir"), "v1")
    assert split_local("docker-archive:x.tar") == (Path("x.tar"), "")
    assert split_local("./dir") == (Path("dir"), "")
    assert default_name(Path("/x/tool.tar.gz"), "") == "tool"
    assert default_name(Path("/x/tool"), "v1") == "tool:v1"
    assert default_name(Path("/x/saved.tar"), "team/tool:1") == "team/tool:1"


def test_credentials_are_where_other_programs_keep_them() -> None:
    found = credential_files({"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"})
    assert [str(path) for path in found] == [
        "/run/user/7/containers/auth.json",
        "/home/u/.config/containers/auth.json",
        "/home/u/.docker/config.json",
    ]
    assert credential_files({"REGISTRY_AUTH_FILE": "/x"}) == [Path("/x")]
