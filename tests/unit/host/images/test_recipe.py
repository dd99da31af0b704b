"""Recipe files, up to the command that builds."""

import hashlib
import tarfile
from pathlib import Path

import pytest

from fusevm.host.images.debian import RECIPES, mmdebstrap_command
from fusevm.host.images.recipe import build_recipe, load_recipe, render_config, render_hooks, write_archive
from fusevm.host.images.store import ImageStore
from fusevm.model.errors import BadRecipe, DigestMismatch


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tool.toml"
    path.write_text(text)
    return path


FULL = """
from = "debian-12"
packages = ["jq", "libfoo+bar"]
steps = ["useradd -m app", "echo 'a b' > /etc/x"]
[[files]]
source = "app"
target = "/opt/app"
mode = "0640"
owner = "1000:1001"
[[binaries]]
source = "tool"
target = "/usr/local/bin/tool"
[config]
env = { PORT = "80" }
user = "app"
entrypoint = ["/usr/local/bin/tool"]
cmd = ["serve"]
"""


def test_a_recipe_becomes_a_command(tmp_path: Path):
    (tmp_path / "app" / "deep").mkdir(parents=True)
    (tmp_path / "app" / "deep" / "file").write_text("content")
    (tmp_path / "app" / "link").symlink_to("/etc/passwd")
    (tmp_path / "tool").write_bytes(b"\x7fELF")
    recipe = load_recipe(write(tmp_path, FULL))
    archive = tmp_path / "files.tar"
    first = write_archive(recipe, tmp_path, archive)
    with tarfile.open(archive) as tar:
        entries = {entry.name: entry for entry in tar}
    assert set(entries) == {
        *("./opt/app", "./opt/app/deep", "./opt/app/deep/file", "./opt/app/link", "./usr/local/bin/tool"),
    }
    file, link, program = (entries[f"./{name}"] for name in ("opt/app/deep/file", "opt/app/link", "usr/local/bin/tool"))
    assert (file.mode, file.uid, file.gid) == (0o640, 1000, 1001)
    assert (link.issym(), link.linkname) == (True, "/etc/passwd")
    assert (program.mode, program.uid) == (0o755, 0)
    # Times and order of the folder change nothing.
    (tmp_path / "app" / "deep" / "file").touch()
    assert write_archive(recipe, tmp_path, archive) == first

    hooks = render_hooks(recipe, archive)
    words = mmdebstrap_command(RECIPES["debian-12"], tmp_path / "root.tar", [], [], hooks)
    chosen = [word for word in words if word.startswith("--customize-hook=")]
    assert chosen[:-1] == [f"--customize-hook={hook}" for hook in hooks]
    assert "rm -rf" in chosen[-1], "what names this machine goes last"
    assert hooks[0].startswith("tar-in ")
    assert hooks[2] == """chroot "$1" /bin/sh -euc 'echo '"'"'a b'"'"' > /etc/x'"""
    config = render_config(recipe)
    assert config.env == {"LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", "PORT": "80"}
    assert (config.user, config.workdir, config.entrypoint, config.cmd) == (
        "app",
        "/root",
        ("/usr/local/bin/tool",),
        ("serve",),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from = ", "Invalid"),
        ("packages = []", "from"),
        ('from = "alpine"', "debian-12, debian-13, scratch"),
        ('from = "debian-12"\npackage = ["x"]', "package"),
        ('from = "debian-12"\npackages = ["--force", "x"]', "no package"),
        ('from = "debian-12"\npackages = ["a;b"]', "no package"),
        ('from = "debian-12"\nsteps = [" "]', "empty"),
        ('from = "scratch"\nsteps = ["true"]', "scratch"),
        ('from = "scratch"', "empty"),
        ('from = "debian-12"\n[[files]]\nsource = "x"\ntarget = "opt/x"', "absolute"),
        ('from = "debian-12"\n[[files]]\nsource = "x"\ntarget = "/opt/../../x"', "absolute"),
        ('from = "debian-12"\n[[files]]\nsource = "x"\ntarget = "/"', "absolute"),
        ('from = "debian-12"\n[[files]]\nsource = "x"\ntarget = "/x"\nmode = "rw"', "octal"),
        ('from = "debian-12"\n[[files]]\nsource = "x"\ntarget = "/x"\nowner = "root"', "numbers"),
        ('from = "debian-12"\n[[binaries]]\nsource = "x"\ntarget = "/x"\nsha256 = "abc"', "64 hex"),
        ('from = "debian-12"\n[config]\nenv = { "A B" = "1" }', "variable"),
        ('from = "debian-12"\n[config]\nworkdir = "x"', "absolute"),
    ],
)
def test_what_is_no_recipe_says_why(tmp_path: Path, text: str, words: str):
    with pytest.raises(BadRecipe, match=words) as caught:
        load_recipe(write(tmp_path, text))
    assert "tool.toml" in caught.value.message


async def test_files_that_are_missing_or_changed_are_refused(tmp_path: Path):
    store = ImageStore(tmp_path / "data")
    missing = write(tmp_path, 'from = "scratch"\n[[files]]\nsource = "none"\ntarget = "/x"')
    with pytest.raises(BadRecipe, match="does not exist"):
        await build_recipe(store, missing)
    (tmp_path / "tool").write_bytes(b"changed")
    wanted = hashlib.sha256(b"as it was").hexdigest()
    demanded = write(
        tmp_path, f'from = "scratch"\n[[binaries]]\nsource = "tool"\ntarget = "/tool"\nsha256 = "{wanted}"'
    )
    with pytest.raises(DigestMismatch, match=wanted):
        await build_recipe(store, demanded)
    with pytest.raises(BadRecipe, match="No such file"):
        await build_recipe(store, tmp_path / "nowhere.toml")
    assert await store.load_all() == []


async def test_a_recipe_from_scratch_is_built_once(tmp_path: Path):
    store = ImageStore(tmp_path / "data")
    (tmp_path / "tool").write_bytes(b"\x7fELF")
    path = write(
        tmp_path, 'from = "scratch"\n[[binaries]]\nsource = "tool"\ntarget = "/bin/tool"\n[config]\ncmd = ["/bin/tool"]'
    )
    built = await build_recipe(store, path)
    assert built.is_new
    assert (built.image.names, built.image.config.cmd) == (("tool",), ("/bin/tool",))
    again = await build_recipe(store, path)
    assert (again.is_new, again.image.digest) == (False, built.image.digest)
    forced = await build_recipe(store, path, name="other", force=True)
    assert (forced.is_new, forced.image.digest) == (True, built.image.digest)
    (tmp_path / "tool").write_bytes(b"\x7fELF2")
    assert (await build_recipe(store, path)).image.digest != built.image.digest
