"""A stack that leaves nothing behind and disturbs no other one on this machine."""

import ipaddress
import os
import secrets
import tempfile
from pathlib import Path

from fusevm.cli.places import Places
from fusevm.cli.settings import Loaded

_ROUTES = Path("/proc/net/route")
#: Ranges tried one after another; the first one belongs to the permanent stack.
_RANGES = tuple(f"10.{second}.0.0/16" for second in range(211, 240))
_TRAVERSABLE = 0o711


def temporary_places() -> Places:
    """A fresh folder. The control plane's user gets through it, and sees nothing."""
    base = "/var/tmp" if os.geteuid() == 0 else None  # noqa: S108 - mkdtemp makes the folder, disks want more than a tmpfs
    folder = Path(tempfile.mkdtemp(prefix="fuse-", dir=base))
    folder.chmod(_TRAVERSABLE)
    return Places(data=folder)


def apart_from_others(host: Loaded, artefacts: Path) -> dict[str, str]:
    """Settings of a host daemon beside another one: names and addresses of its own, kernels and images shared."""
    chosen = {
        "artefact_root": str(artefacts),
        "instance": f"q{secrets.token_hex(3)}",
        "network_range": free_range(_ROUTES.read_text() if _ROUTES.exists() else ""),
    }
    return {name: value for name, value in chosen.items() if not host.is_given(name)}


def free_range(routes: str) -> str:
    """The first range that no route of /proc/net/route (proc(5): addresses in hexadecimal, as in memory) touches."""
    taken = []
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and int(fields[7], 16):
            address, mask = (int.from_bytes(bytes.fromhex(fields[i]), "little") for i in (1, 7))
            taken.append(ipaddress.IPv4Network((address, mask.bit_count()), strict=False))
    for text in _RANGES:
        if not any(route.overlaps(ipaddress.IPv4Network(text)) for route in taken if route.prefixlen > 7):
            return text
    return _RANGES[0]
