"""Carry out one step of an installation again and again, each time killed one change of the file system later.

    killed_steps.py KIND FOLDER      prints how often it was killed

A change is an audit event of CPython (sys.audit), which comes just before it. After each kill the step is carried out
again as long as what `observe` looks at asks for it; then there must be what an undisturbed step leaves, and no more.
"""

import asyncio
import hashlib
import io
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from fusevm.cli.install import steps
from fusevm.cli.install.fetch import is_whole
from fusevm.cli.install.observe import is_release_whole
from fusevm.cli.install.perform import Performer
from fusevm.cli.install.traces import is_there
from fusevm.cli.progress import Meter
from fusevm.host.config import HostConfig
from fusevm.host.images.kernel import FOR_FIRECRACKER, KernelStore
from fusevm.host.images.workspace import find_abandoned
from fusevm.host.tls import identity_files
from fusevm.host.vmm.firecracker.pins import VERSION_TEXT, Pin
from fusevm.model.errors import KernelCorrupt

CHANGES = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown"),
    *("os.truncate", "subprocess.Popen"),
}


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A step in a folder of its own."""

    step: steps.Step
    #: Would the next run's plan have it?
    is_planned: Callable[[], Awaitable[bool]]
    #: Of the outcome, what is the same in every run.
    ignored: tuple[str, ...] = ()


def write(folder: Path) -> Case:
    path = folder / "etc" / "host.env"

    async def is_planned() -> bool:
        return not path.is_file() or path.read_text() != "A=1\n"

    return Case(step=steps.WriteFile(path=path, text="A=1\n", mode=0o600), is_planned=is_planned)


def link(folder: Path) -> Case:
    path = folder / "bin" / "fuse"
    path.parent.mkdir()
    path.symlink_to("/opt/old")

    async def is_planned() -> bool:
        return not path.is_symlink() or path.readlink() != Path("/opt/new")

    return Case(step=steps.LinkProgram(link=path, target=Path("/opt/new")), is_planned=is_planned)


def token(folder: Path) -> Case:
    async def is_planned() -> bool:
        return not all(path.is_file() for path in identity_files(folder / "host"))

    step = steps.MakeToken(data_root=folder / "host")
    return Case(step=step, is_planned=is_planned, ignored=("tls.pem", "token"))


def removal(folder: Path) -> Case:
    path = folder / "lib" / "fuse"
    for name in ("images/one/rootfs", "images/two/rootfs", "host/token"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)

    async def is_planned() -> bool:
        return is_there(path)

    return Case(step=steps.RemovePath(path=path), is_planned=is_planned)


def release(folder: Path) -> Case:
    archive, target = folder / "release.tgz", folder / "firecracker" / f"v{VERSION_TEXT}"
    with archive.open("wb") as file, tarfile.open(fileobj=file, mode="w:gz") as packed:
        for name in ("firecracker", "jailer"):
            text = f"#!/bin/sh\necho '{name.capitalize()} v{VERSION_TEXT}'\n".encode()
            member = tarfile.TarInfo(f"release-v{VERSION_TEXT}-x86_64/{name}-v{VERSION_TEXT}-x86_64")
            member.size, member.mode = len(text), 0o755
            packed.addfile(member, io.BytesIO(text))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()

    async def is_planned() -> bool:
        return not is_release_whole(target, digest) or bool(find_abandoned(target.parent))

    step = steps.UnpackRelease(archive=archive, sha256=digest, folder=target, version=VERSION_TEXT)
    return Case(step=step, is_planned=is_planned, ignored=("release.tgz", "release.json"))


def local_file(folder: Path) -> Case:
    source, target = folder / "usb" / "vmlinux", folder / "downloads" / "vmlinux"
    source.parent.mkdir()
    source.write_bytes(b"kernel")
    digest = hashlib.sha256(b"kernel").hexdigest()

    async def is_planned() -> bool:
        return not is_whole(target, digest)

    pin = Pin(url="http://mirror.example/vmlinux", sha256=digest)
    return Case(step=steps.GetFile(pin=pin, target=target, source=source), is_planned=is_planned)


def kernel(folder: Path) -> Case:
    file, store = folder / "vmlinux", KernelStore(folder / "data")
    shutil.copy(os.environ["FUSE_TEST_KERNEL"], file)

    async def is_planned() -> bool:
        if find_abandoned(folder / "data" / "kernels"):
            return True
        try:
            await store.verify(await store.resolve(FOR_FIRECRACKER))
        except (KernelCorrupt, OSError):
            return True
        return False

    return Case(
        step=steps.StoreKernel(file=file, data=folder / "data"), is_planned=is_planned, ignored=("kernel.json",)
    )


CASES = {case.__name__: case for case in (write, link, token, removal, release, local_file, kernel)}


def look(folder: Path, ignored: tuple[str, ...]) -> dict[str, Any]:
    """Everything below a folder: name -> mode and content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        content: object = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        known = content if path.name not in ignored else "whatever"
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, known)
    return found


async def carry_out(case: Case) -> None:
    with Meter() as meter:
        await Performer(HostConfig(data_root=Path("/nowhere")), lambda _line: None, meter).perform(case.step)


async def finish(case: Case) -> None:
    while await case.is_planned():
        await carry_out(case)


def killed_after(changes: int, case: Case) -> bool:
    """Carry it out in a process that is killed after so many changes, before the next; False: there was no next."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = [changes]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in CHANGES and not is_write:
            return
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    try:
        sys.addaudithook(count)
        asyncio.run(carry_out(case))
    except BaseException as e:  # noqa: BLE001 - a child must not go on as its parent
        print(f"not killed, and failed: {e!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(kind: str, root: Path) -> None:
    changes, wanted = 0, None
    while True:
        folder = root / "step"
        folder.mkdir()
        case = CASES[kind](folder)
        if wanted is None:
            asyncio.run(carry_out(case))
            wanted = look(folder, case.ignored)
        else:
            is_killed = killed_after(changes, case)
            asyncio.run(finish(case))
            found = look(folder, case.ignored)
            assert found == wanted, (changes, sorted(found.items() ^ wanted.items(), key=str))
            if not is_killed:
                break
            changes += 1
        shutil.rmtree(folder)
    print(changes)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
