"""Images from recipe files: `fuse image build -f RECIPE`.

    from = "debian-12"                  # debian-12, debian-13, or scratch: nothing at all
    packages = ["jq", "nodejs"]
    steps = ["useradd -m app"]          # by `sh -eu`, as root in the new system, after packages and files

    [[files]]                           # a file or a folder beside the recipe
    source = "app"
    target = "/opt/app"
    mode = "0755"                       # of files; default: their own
    owner = "1000:1000"                 # numbers; default 0:0

    [[binaries]]                        # mode 0755, and the digest is held to
    source = "bin/tool"
    target = "/usr/local/bin/tool"
    sha256 = "..."

    [config]
    env = { PORT = "80" }
    workdir = "/opt/app"
    user = "app"
    entrypoint = ["/usr/local/bin/tool"]
    cmd = ["serve"]

The same recipe, files and packages give the same image. Steps are the recipe's author's: they run on this host, in a
chroot in namespaces of their own, so a recipe is trusted like a Makefile.

Owns: the file's form, and what is taken from beside it. Must not: know mmdebstrap's command line (`debian` does).
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
import shlex
import stat
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from fusevm.host.images.build import finish, inputs_hash, lock_name
from fusevm.host.images.debian import RECIPES, Built, Recipe, build_system
from fusevm.host.images.ext4 import EPOCH_S
from fusevm.host.images.progress import Progress, ProgressEvent, ignore_progress
from fusevm.host.images.store import ImageConfig, ImageStore, parse_name
from fusevm.host.images.workspace import exclusive, workspace
from fusevm.model.errors import BadRecipe, DigestMismatch

SCRATCH: Final = "scratch"
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9-]+)?(?:[=/][A-Za-z0-9.+~:-]+)?")
_MODE: Final = re.compile(r"0?[0-7]{3,4}")
_OWNER: Final = re.compile(r"(\d{1,9}):(\d{1,9})")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NEEDED_BYTES: Final = 2 << 30


class RecipeFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file or folder that goes into the image."""

    source: str
    #: Absolute path in the image; of a folder: where its content goes.
    target: str
    mode: str = ""
    owner: str = "0:0"


class RecipeBinary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A program of one's own."""

    source: str
    target: str
    #: 64 hex digits; empty: whatever is there.
    sha256: str = ""


class RecipeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How commands run; what is missing is the base's."""

    env: dict[str, str] = {}
    workdir: str = ""
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()


class ImageRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"base": "from"}):
    """A recipe as it is written."""

    #: `debian-12`, `debian-13` or `scratch`.
    base: str
    name: str = ""
    packages: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    files: tuple[RecipeFile, ...] = ()
    binaries: tuple[RecipeBinary, ...] = ()
    config: RecipeConfig = RecipeConfig()


class _Taken(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the archive of files."""

    path: Path
    name: str
    mode: int
    uid: int
    gid: int


async def build_recipe(
    store: ImageStore, path: Path, *, name: str = "", progress: Progress = ignore_progress, force: bool = False
) -> Built:
    """Build the image of a recipe file, unless one of the same recipe, files and name is there.

    Raises BadRecipe, DigestMismatch, and what `build_debian` raises. Nothing is left behind on failure.
    """
    recipe = await asyncio.to_thread(load_recipe, path)
    wanted = parse_name(name or recipe.name or path.stem.lower())
    config = render_config(recipe)
    async with exclusive(store.root, lock_name(wanted)), workspace(store.root, _NEEDED_BYTES) as folder:
        progress(ProgressEvent(step="Collecting the recipe's files"))
        archive = folder / "files.tar"
        sha256 = await asyncio.to_thread(write_archive, recipe, path.parent, archive)
        inputs = inputs_hash(recipe, sha256, RECIPES.get(recipe.base))
        found = await store.find(wanted)
        if found is not None and found.record.inputs == inputs and not force:
            progress(ProgressEvent(step="Image ready", detail=f"{wanted} is up to date; --force builds it again"))
            return Built(image=found, is_new=False)
        source = f"recipe {path.name}"
        content = archive
        if recipe.base != SCRATCH:
            content = await build_system(_system(recipe), folder, progress, hooks=render_hooks(recipe, archive))
        image = await finish(store, wanted, content, folder, config, source, inputs, progress)
    return Built(image=image, is_new=True)


def load_recipe(path: Path) -> ImageRecipe:
    """Read and check a recipe file. Raises BadRecipe."""
    try:
        document = tomllib.loads(path.read_text())
        recipe = msgspec.convert(document, ImageRecipe)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as e:
        problem = e.strerror or str(e) if isinstance(e, OSError) else str(e)
        raise BadRecipe(path=str(path), problem=problem) from e
    problem = next(find_problems(recipe), "")
    if problem:
        raise BadRecipe(path=str(path), problem=problem)
    return recipe


def find_problems(recipe: ImageRecipe) -> Iterator[str]:
    """What is wrong with a recipe, in its order. Pure."""
    if recipe.base not in (*RECIPES, SCRATCH):
        yield f"from must be one of {', '.join([*RECIPES, SCRATCH])}, not {recipe.base!r}"
    if recipe.base == SCRATCH and (recipe.packages or recipe.steps):
        yield "from scratch there is nothing that packages and steps could use; take files and binaries"
    if recipe.base == SCRATCH and not (recipe.files or recipe.binaries):
        yield "from scratch without files and binaries it would be empty"
    yield from (f"{name!r} is no package" for name in recipe.packages if not _PACKAGE.fullmatch(name))
    yield from ("a step is empty" for step in recipe.steps if not step.strip() or "\0" in step)
    for file in recipe.files:
        yield from _find_target_problems(file.target)
        if file.mode and not _MODE.fullmatch(file.mode):
            yield f"the mode {file.mode!r} of {file.target} is not octal, like 0644"
        if not _OWNER.fullmatch(file.owner):
            yield f"the owner {file.owner!r} of {file.target} is not uid:gid in numbers"
    for binary in recipe.binaries:
        yield from _find_target_problems(binary.target)
        if binary.sha256 and not _SHA256.fullmatch(binary.sha256):
            yield f"the sha256 of {binary.target} is not 64 hex digits"
    yield from (f"{name!r} is no name of a variable" for name in recipe.config.env if not _VARIABLE.fullmatch(name))
    if recipe.config.workdir and not recipe.config.workdir.startswith("/"):
        yield f"the workdir {recipe.config.workdir!r} is not absolute"


def render_config(recipe: ImageRecipe) -> ImageConfig:
    """How commands run in the image: the recipe's word over the base's. Pure."""
    base = RECIPES[recipe.base].config if recipe.base in RECIPES else ImageConfig()
    own = recipe.config
    return ImageConfig(
        env={**base.env, **own.env},
        workdir=own.workdir or base.workdir,
        user=own.user or base.user,
        entrypoint=own.entrypoint or base.entrypoint,
        cmd=own.cmd or base.cmd,
    )


def render_hooks(recipe: ImageRecipe, archive: Path) -> list[str]:
    """What mmdebstrap does when the packages are there: files, then steps. Pure."""
    hooks = [f"tar-in {shlex.quote(str(archive))} /"] if recipe.files or recipe.binaries else []
    return hooks + [f'chroot "$1" /bin/sh -euc {shlex.quote(step)}' for step in recipe.steps]


def write_archive(recipe: ImageRecipe, beside: Path, archive: Path) -> str:
    """Write the recipe's files as a tar that depends on nothing else; its sha256. Raises BadRecipe, DigestMismatch."""
    taken = sorted(_collect(recipe, beside), key=lambda one: one.name)
    folders = sorted({str(parent) for one in taken for parent in PurePosixPath(one.name).parents} - {"."})
    named = {one.name for one in taken}
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for folder in folders:
            if folder not in named and recipe.base == SCRATCH:
                tar.addfile(_header(f"./{folder}", tarfile.DIRTYPE, 0o755))
        for one in taken:
            _add(tar, one)
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _system(recipe: ImageRecipe) -> Recipe:
    base = RECIPES[recipe.base]
    return msgspec.structs.replace(base, packages=tuple(dict.fromkeys([*base.packages, *recipe.packages])))


def _find_target_problems(target: str) -> Iterator[str]:
    if not target.startswith("/") or ".." in target.split("/") or not target.strip("/") or "\0" in target:
        yield f"the target {target!r} is no absolute path of a file in the image"


def _collect(recipe: ImageRecipe, beside: Path) -> Iterator[_Taken]:
    for file in recipe.files:
        uid, gid = (int(part) for part in file.owner.split(":"))
        mode = int(file.mode, 8) if file.mode else None
        yield from _walk(_source(beside, file.source), _name(file.target), mode, uid, gid)
    for binary in recipe.binaries:
        path = _source(beside, binary.source)
        if not path.is_file():
            raise BadRecipe(path=str(path), problem="a binary must be a file")
        if binary.sha256:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != binary.sha256:
                raise DigestMismatch(what=str(path), found=found, wanted=binary.sha256)
        yield _Taken(path=path, name=_name(binary.target), mode=0o755, uid=0, gid=0)


def _walk(path: Path, name: str, mode: int | None, uid: int, gid: int) -> Iterator[_Taken]:
    kind = path.lstat().st_mode
    is_folder = stat.S_ISDIR(kind)
    if not (is_folder or stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
        raise BadRecipe(path=str(path), problem="only files, folders and links can be taken")
    own = stat.S_IMODE(kind) & 0o755 | 0o600
    yield _Taken(path=path, name=name, mode=own if is_folder or mode is None else mode, uid=uid, gid=gid)
    if is_folder:
        for entry in sorted(path.iterdir()):
            yield from _walk(entry, f"{name}/{entry.name}", mode, uid, gid)


def _source(beside: Path, text: str) -> Path:
    """A path beside the recipe; it may lie anywhere, since the recipe's author may read it anyway."""
    path = beside / text
    if not os.path.lexists(path):
        raise BadRecipe(path=str(path), problem="it does not exist")
    return path


def _name(target: str) -> str:
    return "/".join(part for part in target.split("/") if part not in ("", "."))


def _add(tar: tarfile.TarFile, one: _Taken) -> None:
    name = f"./{one.name}"
    if one.path.is_symlink():
        header = _header(name, tarfile.SYMTYPE, 0o777, one.uid, one.gid)
        header.linkname = str(one.path.readlink())
        tar.addfile(header)
    elif one.path.is_dir():
        tar.addfile(_header(name, tarfile.DIRTYPE, one.mode, one.uid, one.gid))
    else:
        data = one.path.read_bytes()
        header = _header(name, tarfile.REGTYPE, one.mode, one.uid, one.gid)
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))


def _header(name: str, kind: bytes, mode: int, uid: int = 0, gid: int = 0) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.mode, header.uid, header.gid, header.mtime = kind, mode, uid, gid, EPOCH_S
    return header
