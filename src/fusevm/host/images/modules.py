"""Which kernel modules a machine needs, and in which order they load. Pure.

Reads what depmod(8) writes: `modules.dep` ("file: dependency ..." where dependencies load from right to left) and
`modules.builtin`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

#: Without these no machine comes up with disks and a network.
REQUIRED = ("virtio_mmio", "virtio_blk", "ext4", "overlay", "virtio_net")
#: Loaded where the kernel has them as modules; built in or absent is fine.
OPTIONAL = ("virtio_console", "vmw_vsock_virtio_transport")
#: Loaded first where they are modules: what others find by name at run time (softdep), not by symbol.
FIRST = ("crc32c_generic",)


#: End of a signed module (kernel, scripts/sign-file.c): signature, 12 bytes of which the last 4 are its length
#: (big-endian), this text.
_SIGNED = b"~Module signature appended~\n"
_SIGNATURE_INFO_BYTES = 12


class MissingModules(ValueError):
    """The kernel neither has these modules nor has them built in; the text is the list of names."""


def module_name(path: str) -> str:
    """Return the module name of a file: `kernel/x/virtio-rng.ko.xz` is `virtio_rng`."""
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def is_vsock(file: str) -> bool:
    """Tell whether a module is only there for vsock, which costs 0.15 s of an emulated boot."""
    return "vsock" in module_name(file)


def without_signature(module: bytes) -> bytes:
    """Return a module without its signature: the kernels we start do not ask for one, and checking all of them costs
    0.15 s of an emulated boot (measured)."""
    if not module.endswith(_SIGNED):
        return module
    end = len(module) - len(_SIGNED)
    length = int.from_bytes(module[end - 4 : end], "big")
    return module[: end - _SIGNATURE_INFO_BYTES - length]


def parse_dependencies(modules_dep: str) -> dict[str, list[str]]:
    """Parse modules.dep into file -> files it needs, in the order of the file."""
    parsed = {}
    for line in modules_dep.splitlines():
        file, colon, needed = line.partition(":")
        if colon:
            parsed[file.strip()] = needed.split()
    return parsed


def parse_builtin(modules_builtin: str) -> set[str]:
    """Parse modules.builtin into names."""
    return {module_name(line) for line in modules_builtin.split()}


def load_order(
    dependencies: Mapping[str, list[str]],
    builtin: Iterable[str],
    required: Iterable[str] = REQUIRED,
    optional: Iterable[str] = OPTIONAL,
    first: Iterable[str] = FIRST,
) -> list[str]:
    """Return the module files to load, each after what it needs, each once.

    Raise MissingModules when a required one is neither a module nor built in.
    """
    files = {module_name(file): file for file in dependencies}
    present = set(builtin)
    required = tuple(required)
    missing = [name for name in required if name not in files and name not in present]
    if missing:
        raise MissingModules(", ".join(missing))
    order: list[str] = []

    def visit(file: str) -> None:
        if file in order:
            return
        for needed in reversed(dependencies.get(file, [])):
            visit(needed)
        if file not in order:
            order.append(file)

    for name in (*first, *required, *optional):
        if name in files:
            visit(files[name])
    return order
