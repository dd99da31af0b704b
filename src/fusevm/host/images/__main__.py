"""`python -m fusevm.host.images`: make the artefacts of a data directory by hand. The last line printed is its path."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from fusevm.host.images.blank import ensure_blank
from fusevm.host.images.build import build_minimal
from fusevm.host.images.debian import RECIPES, build_debian
from fusevm.host.images.initramfs import ensure_initramfs
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.progress import ProgressEvent
from fusevm.host.images.store import ImageStore
from fusevm.model.errors import Error


def main() -> int:
    """Parse the command line, do it, and return the exit status."""
    args = _parser().parse_args()
    try:
        sys.stdout.write(f"{asyncio.run(_do(args))}\n")
    except Error as e:
        sys.stderr.write(f"{e.message}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusevm.host.images", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data directory")
    commands = parser.add_subparsers(dest="command", required=True)
    kernel = commands.add_parser("kernel", help="fetch Debian's cloud kernel, or take a file")
    kernel.add_argument("--path", type=Path, help="bzImage or ELF kernel")
    kernel.add_argument("--force", action="store_true", help="fetch the newest one")
    build = commands.add_parser("build", help="build a baked image")
    build.add_argument("name", choices=sorted(RECIPES))
    build.add_argument("--force", action="store_true", help="build with the packages of today")
    minimal = commands.add_parser("minimal", help="make the image `minimal` of one static program")
    minimal.add_argument("binary", type=Path)
    initramfs = commands.add_parser("initramfs", help="make the initramfs of the kernel and the agent")
    initramfs.add_argument("--agent", type=Path, help="guest agent (default: the installed one)")
    blank = commands.add_parser("blank", help="make a blank overlay")
    blank.add_argument("size_mib", type=int)
    verify = commands.add_parser("verify", help="read an image and compare its digest")
    verify.add_argument("name")
    commands.add_parser("list", help="list images and kernels")
    return parser


async def _do(args: argparse.Namespace) -> str:
    store, kernels = ImageStore(args.data), KernelStore(args.data)
    match args.command:
        case "kernel":
            return str((await kernels.ensure(args.path, progress=_show, force=args.force)).vmlinux)
        case "build":
            return str((await build_debian(store, args.name, progress=_show, force=args.force)).image.rootfs)
        case "minimal":
            return str((await build_minimal(store, args.binary)).rootfs)
        case "initramfs":
            return str(await ensure_initramfs(args.data, await kernels.ensure(progress=_show), args.agent))
        case "blank":
            return str(await ensure_blank(args.data, args.size_mib << 20))
        case "verify":
            image = await store.resolve(args.name)
            await store.verify(image)
            return f"{image.label} {image.digest} is whole"
        case _:
            lines = [
                f"{i.label}\t{i.digest}\t{i.record.size_bytes >> 20} MiB\t{i.rootfs}" for i in await store.load_all()
            ]
            lines += [f"kernel {k.record.version}\t{k.digest}\t{k.vmlinux}" for k in await kernels.load_all()]
            return "\n".join(lines)


def _show(event: ProgressEvent) -> None:
    amount = ""
    if event.done_bytes is not None:
        total = f"/{event.total_bytes >> 20}" if event.total_bytes else ""
        amount = f" {event.done_bytes >> 20}{total} MiB"
    detail = f": {event.detail}" if event.detail else ""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{event.step}{amount}{detail}" + ("" if amount else "\n"))
    elif not amount or event.done_bytes == event.total_bytes:
        sys.stderr.write(f"{event.step}{amount}{detail}\n")


if __name__ == "__main__":
    sys.exit(main())
