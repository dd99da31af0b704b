"""The baked Debian image: mmdebstrap with the machine's own mirrors, reproducible for the same packages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from fusevm.host.images.apt import Source, folder_bytes, read_network_settings, read_sources
from fusevm.host.images.build import finish, inputs_hash, lock_name
from fusevm.host.images.ext4 import EPOCH_S
from fusevm.host.images.progress import Progress, ProgressEvent, ignore_progress, watched_bytes
from fusevm.host.images.store import Image, ImageConfig, ImageStore
from fusevm.host.images.subordinate import find_shortage
from fusevm.host.images.workspace import exclusive, passing_folder, workspace
from fusevm.host.run import program_environment, run, run_streaming
from fusevm.model.errors import BadSetting, ImageNotFound, ToolMissing

_BUILD_TIMEOUT_S = 3600
_PROBE_TIMEOUT_S = 30
_NEEDED_BYTES = 2 << 30
_POCKETS = ("", "-updates", "-security")
_OS_RELEASE = Path("/etc/os-release")
#: Where an ordinary user with a private home builds; ours are below it, one folder per user.
_SHARED_TMP = Path("/var/tmp")  # noqa: S108 - what is made in it is checked


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What a baked Debian image holds."""

    name: str
    suite: str
    packages: tuple[str, ...]
    #: Left out of the image (dpkg path-exclude), as Debian's slim images do; licences stay.
    excluded: tuple[str, ...] = (
        "/usr/share/man/*",
        "/usr/share/locale/*",
        "/usr/share/info/*",
        "/usr/share/groff/*",
        "/usr/share/lintian/*",
        "/usr/share/doc/*",
    )
    included: tuple[str, ...] = ("/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias")
    config: ImageConfig = ImageConfig(
        env={"LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}, workdir="/root", user="root"
    )


_PACKAGES = ("ca-certificates", "curl", "git", "iproute2", "openssh-server", "procps", "python3")
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="debian-12", suite="bookworm", packages=_PACKAGES),
        Recipe(name="debian-13", suite="trixie", packages=_PACKAGES),
    )
}


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a build that may have had nothing to do."""

    image: Image
    #: False: an image of the same inputs was there.
    is_new: bool


async def build_debian(
    store: ImageStore, name: str, *, progress: Progress = ignore_progress, force: bool = False
) -> Built:
    """Build a baked Debian image, unless one of the same recipe is there.

    `force` builds with the packages of today. ImageNotFound for an unknown name; NoSpace, ToolMissing, CommandFailed.
    Nothing is left behind on failure. Needs root, or subordinate uids and the package uidmap.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise ImageNotFound(image=name, known=", ".join(RECIPES))
    inputs = inputs_hash(_inputs(recipe))
    async with exclusive(store.root, lock_name(name)):
        image = await store.find(name)
        if image is not None and image.record.inputs == inputs and not force:
            progress(ProgressEvent(step="Image ready", detail=up_to_date_text(image, time.time())))
            return Built(image=image, is_new=False)
        async with workspace(store.root, _NEEDED_BYTES) as folder:
            tar = await build_system(recipe, folder, progress)
            source = f"mmdebstrap {recipe.suite}"
            image = await finish(store, name, tar, folder, recipe.config, source, inputs, progress)
    return Built(image=image, is_new=True)


def _inputs(recipe: Recipe) -> msgspec.Raw:
    """What an image of a recipe depends on. One without a command is what it was before images had commands."""
    encoded = msgspec.json.encode(recipe, order="deterministic")
    return msgspec.Raw(encoded.replace(b',"cmd":[]', b""))


async def build_system(recipe: Recipe, folder: Path, progress: Progress, hooks: Sequence[str] = ()) -> Path:
    """Make the system of a recipe in a workspace and return its tar. `hooks`: shell lines of mmdebstrap, in order."""
    await asyncio.to_thread(check_rootless)
    async with _scratch(folder) as scratch:
        return await debootstrap(recipe, folder, scratch, progress, hooks)


async def debootstrap(
    recipe: Recipe, folder: Path, scratch: Path, progress: Progress, hooks: Sequence[str] = ()
) -> Path:
    """Install the recipe's packages into a new root file system below `scratch` and return its tar in `folder`."""
    tar = folder / "root.tar"
    lines = mirror_lines(await read_sources(), await asyncio.to_thread(_host_codename), recipe.suite)
    words = mmdebstrap_command(recipe, tar, lines, await read_network_settings(), hooks)
    archives = "mmdebstrap.*/var/cache/apt/archives"

    def downloaded() -> int:
        return sum(folder_bytes(path) for path in scratch.glob(archives))

    def say(line: str) -> None:
        if line.startswith("I: "):
            progress(ProgressEvent(step=f"Installing Debian {recipe.suite}", detail=line[3:].rstrip(".")))

    env = {"SOURCE_DATE_EPOCH": str(EPOCH_S), "TMPDIR": str(scratch)}
    async with watched_bytes(progress, f"Installing Debian {recipe.suite}", downloaded, None):
        await run_streaming(await dying_with_parent(words), on_line=say, timeout_s=_BUILD_TIMEOUT_S, env=env)
    return tar


def mmdebstrap_command(
    recipe: Recipe, tar: Path, mirrors: list[str], network_settings: list[str], hooks: Sequence[str] = ()
) -> list[str]:
    """Build the mmdebstrap command line. Pure."""
    words = ["mmdebstrap", "--variant=minbase", "--format=tar", f"--include={','.join(recipe.packages)}"]
    words += ['--aptopt=APT::Install-Recommends "false"']
    words += [f"--aptopt={line}" for line in network_settings]
    words += [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.excluded]
    words += [f"--dpkgopt=path-include={pattern}" for pattern in recipe.included]
    words += [f"--customize-hook={hook}" for hook in hooks]
    # What names this machine or its network stays out of the image.
    forgotten = "etc/apt/apt.conf.d/99mmdebstrap etc/hostname etc/resolv.conf etc/machine-id"
    forgotten += " var/lib/dbus/machine-id var/log/apt var/log/dpkg.log var/log/bootstrap.log var/log/alternatives.log"
    # So does what must not be shared: whoever lets people in by SSH brings a key per machine.
    forgotten += " etc/ssh/ssh_host_*"
    words += [f'--customize-hook=cd "$1" && rm -rf {forgotten} && : > etc/machine-id']
    return [*words, recipe.suite, str(tar), *mirrors]


def mirror_lines(sources: list[Source], host_codename: str, suite: str) -> list[str]:
    """Return the sources.list lines for a suite from the mirrors of a Debian machine; none: mmdebstrap's own choice.

    Entries of the machine's release (bookworm, bookworm-updates, bookworm-security) are taken for the same pockets of
    the wanted suite. Pure.
    """
    pockets = {f"{host_codename}{pocket}": f"{suite}{pocket}" for pocket in _POCKETS} if host_codename else {}
    return [
        msgspec.structs.replace(source, release=pockets[source.release]).line()
        for source in sources
        if source.release in pockets and source.component == "main"
    ]


async def dying_with_parent(words: list[str]) -> list[str]:
    """Wrap a command so that it, and all it starts, ends when this process is killed.

    As root also in a mount namespace of its own, so that no mount of a killed build stays behind; where that is not
    allowed (a container, a plain chroot) only the command itself ends.
    """
    wrapped = ["setpriv", "--pdeathsig", "KILL", "--"]
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "--"]
    if os.geteuid() == 0 and (await run([*apart, "true"], timeout_s=_PROBE_TIMEOUT_S, check=False)).returncode == 0:
        wrapped += apart
    return [*wrapped, *words]


def up_to_date_text(image: Image, now_s: float) -> str:
    """Say that nothing was to do, and how old the image is."""
    days = int(now_s - image.record.created_at_ms / 1000) // 86400
    age = "today" if days == 0 else f"{days} day{'s' if days > 1 else ''} ago"
    return f"{image.label} is up to date (built {age}); --force builds it again with the packages of today"


def check_rootless() -> None:
    """Raise unless this user may own the many users of a Debian system, by subordinate ids or as root."""
    if os.geteuid() == 0:
        return
    if shutil.which("newuidmap", path=program_environment()["PATH"]) is None:
        raise ToolMissing(program="newuidmap", package="uidmap")
    short = find_shortage()
    if short is not None:
        remedy = f"as root run `{short.command}`, or run all of this as root" if short.command else "run this as root"
        raise BadSetting(setting=short.table, problem=f"{short.problem}; {remedy}")


@contextlib.asynccontextmanager
async def _scratch(folder: Path) -> AsyncIterator[Path]:
    """A folder for mmdebstrap: in the workspace, or elsewhere when that is below a private home.

    Without root mmdebstrap works as subordinate users, and these do not get through a folder of mode 0700.
    """
    await asyncio.to_thread(folder.chmod, 0o755)
    async with contextlib.AsyncExitStack() as stack:
        if not await asyncio.to_thread(_is_reachable, folder):
            root = await stack.enter_async_context(passing_folder(_SHARED_TMP / f"fuse-build-{os.geteuid()}"))
            folder = await stack.enter_async_context(workspace(root, _NEEDED_BYTES))
        scratch = folder / "mmdebstrap"
        await asyncio.to_thread(scratch.mkdir)
        await asyncio.to_thread(scratch.chmod, 0o1777)
        yield scratch


def _is_reachable(folder: Path) -> bool:
    return os.geteuid() == 0 or all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


def _host_codename() -> str:
    """Return the codename of a Debian machine, or nothing: only Debian's mirrors hold Debian."""
    fields = dict(line.split("=", 1) for line in _OS_RELEASE.read_text().splitlines() if "=" in line)
    return fields.get("VERSION_CODENAME", "").strip('"') if fields.get("ID", "").strip('"') == "debian" else ""
