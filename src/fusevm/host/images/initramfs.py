"""The initramfs of a machine: the guest agent as /init, and the modules its kernel needs.

Cached under `<data>/initramfs/<agent digest, 12>-<kernel digest, 12>[-vsock].cpio`: a new agent or kernel makes a new
file, and nothing needs to be invalidated. Not compressed: unpacking costs more, in an emulated machine, than reading.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from fusevm.host.images.cpio import Entry, character_device, file, folder, write_archive
from fusevm.host.images.kernel import Kernel
from fusevm.host.images.modules import is_vsock
from fusevm.host.images.workspace import write_durably
from fusevm.model.errors import VmmMissing

#: Where the guest protocol (section 5) and the agent expect things to be mounted.
_MOUNT_POINTS = ("dev", "proc", "sys", "run", "tmp", "newroot", "image", "overlay")
_AGENT_FOLDER = Path(__file__).parent.parent / "guest"


def agent_path(architecture: str = "amd64") -> Path:
    """Return the guest agent that was built into this installation."""
    path = _AGENT_FOLDER / f"fused-{architecture}"
    if not path.is_file():
        raise VmmMissing(program=f"The guest agent {path}", remedy="run `make agent` in the source folder")
    return path


async def ensure_initramfs(data: Path, kernel: Kernel, agent: Path | None = None, *, with_vsock: bool = False) -> Path:
    """Return the initramfs of a kernel and an agent (default: the installed one), made when it is not there.

    `with_vsock` adds the modules of the vsock device, for a VMM that has one and a kernel that has them as modules.
    """
    agent = agent or agent_path(kernel.record.architecture)
    return await asyncio.to_thread(_ensure, data / "initramfs", kernel, agent, with_vsock)


def render_initramfs(agent: bytes, modules: list[tuple[str, bytes]]) -> bytes:
    """Return the archive of an agent and of modules in load order. Pure."""
    order = "".join(f"{name}\n" for name, _content in modules).encode()
    entries: list[Entry] = [
        *(folder(path) for path in _MOUNT_POINTS),
        folder("modules"),
        character_device("dev/console", 5, 1),
        character_device("dev/null", 1, 3, 0o666),
        file("init", agent, 0o755),
        file("modules/order", order),
        *(file(f"modules/{name}", content) for name, content in modules),
    ]
    return write_archive(entries)


def _ensure(root: Path, kernel: Kernel, agent: Path, with_vsock: bool) -> Path:
    content = agent.read_bytes()
    variant = "-vsock" if with_vsock else ""
    path = root / f"{hashlib.sha256(content).hexdigest()[:12]}-{kernel.digest[:12]}{variant}.cpio"
    if not path.is_file():
        root.mkdir(parents=True, exist_ok=True)
        modules = [
            (module.name, module.read_bytes()) for module in kernel.modules if with_vsock or not is_vsock(module.name)
        ]
        write_durably(path, render_initramfs(content, modules))
    return path
