"""The one door to changes of nftables, on the host and inside namespaces."""

import os
from collections.abc import Sequence

from fusevm.host.net.nft import Json, render_document
from fusevm.host.run import run

_TIMEOUT_S = 30.0


async def apply_transaction(commands: Sequence[Json], *, namespace_path: str = "") -> None:
    """Apply commands, all of them or none, on the host or inside a namespace. CommandFailed if nft refuses them."""
    if not commands:
        return
    # Not through standard input: nft opens it by name (/dev/stdin), which fails for the sockets that uvloop makes.
    document = os.memfd_create("fuse-nft", os.MFD_CLOEXEC)
    try:
        _fill(document, render_document(commands))
        entry = ["nsenter", f"--net={namespace_path}"] if namespace_path else []
        argv = [*entry, "nft", "-j", "-f", f"/dev/fd/{document}"]
        await run(argv, timeout_s=_TIMEOUT_S, pass_fds=[document])
    finally:
        os.close(document)


def _fill(document: int, data: bytes) -> None:
    """Write to memory, which does not block."""
    with os.fdopen(document, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(document, 0, os.SEEK_SET)
