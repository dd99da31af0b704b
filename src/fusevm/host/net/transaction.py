"""The one door to nftables, on the host and inside namespaces: libnftables(3), the library behind `nft`.

A small change takes 0.1 ms this way; to start `nft` for it takes 4 (docs/decisions/0024-nftables-in-process.md). Calls
are made by threads, since the removal of an element waits for the kernel; whoever is cancelled meanwhile is so after
the call, so that the next one never overtakes it.

Owns: the binding. Must not: know any rule.
"""

import asyncio
import ctypes
import functools
import socket
import threading
from collections.abc import Callable, Sequence

from fusevm.host.net.namespace import run_inside
from fusevm.host.net.nft import Json, render_document
from fusevm.host.run import PACKAGES, run
from fusevm.host.tasks import finish
from fusevm.model.errors import CommandFailed, ToolMissing

_LIBRARY = "libnftables.so.1"
#: linux/netlink.h
_NETLINK_NETFILTER = 12
_TIMEOUT_S = 30.0
#: nftables/libnftables.h: rules without their counters, as JSON, sets without their elements.
_STATELESS, _JSON, _TERSE = 1 << 1, 1 << 4, 1 << 11
#: The options of `nft` for them, for messages that can be tried in a shell.
_OPTIONS = {_STATELESS: "-s", _JSON: "-j", _TERSE: "-t"}

# The library says nothing about threads; contexts of different threads share tables of names.
_lock = threading.Lock()


async def apply_transaction(commands: Sequence[Json], *, namespace_path: str = "") -> None:
    """Apply commands, all of them or none, on the host or inside a namespace. CommandFailed if they are refused."""
    if not commands:
        return
    document = render_document(commands)
    work = functools.partial(_run, document, _JSON, "-f -")
    if namespace_path:
        await finish(run_inside(namespace_path, work, timeout_s=None))
    else:
        await _call(work)


async def list_table(name: str) -> bytes:
    """List a table of the family `inet` as JSON, with elements and counts; nothing if there is none."""
    try:
        return await _list(f"list table inet {name}", _JSON)
    except CommandFailed:
        return b""


async def list_set(table: str, name: str) -> bytes:
    """List a set of such a table as JSON with its elements. CommandFailed, also if there is none."""
    return await _list(f"list set inet {table} {name}", _JSON)


async def list_rules(name: str) -> bytes:
    """List a table's chains and rules without what changes by itself: elements and counts; nothing if there is none."""
    try:
        return await _list(f"list table inet {name}", _STATELESS | _TERSE)
    except CommandFailed:
        return b""


async def list_ruleset() -> bytes:
    """List everybody's rules as JSON, without the elements of sets, which may be many. CommandFailed.

    By the program: nothing that others have put into the kernel is parsed in this process.
    """
    return (await run(["nft", "-j", "-t", "list", "ruleset"], timeout_s=_TIMEOUT_S)).stdout


async def _list(command: str, flags: int) -> bytes:
    return await _call(functools.partial(_run, command.encode(), flags, command))


async def _call(work: Callable[[], bytes]) -> bytes:
    return await finish(asyncio.to_thread(work))


def _run(text: bytes, flags: int, told: str) -> bytes:
    """Carry out commands in a context of their own and return what is listed. CommandFailed, OSError."""
    library = _load()
    with _lock:
        # Without a free descriptor the library ends the process; like this it is an OSError of this call.
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER).close()
        context = library.nft_ctx_new(0)
        if not context:
            raise MemoryError
        try:
            library.nft_ctx_output_set_flags(context, flags)
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            status = library.nft_run_cmd_from_buffer(context, text)
            output = bytes(library.nft_ctx_get_output_buffer(context) or b"")
            problem = bytes(library.nft_ctx_get_error_buffer(context) or b"")
        finally:
            library.nft_ctx_free(context)
    if status != 0:
        options = " ".join(option for flag, option in _OPTIONS.items() if flags & flag)
        raise CommandFailed(
            command=f"nft {options} {told}",
            exit_status=1,
            stderr=problem.decode(errors="replace").strip(),
        )
    return output


@functools.cache
def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as e:
        raise ToolMissing(program="nft", package=PACKAGES["nft"]) from e
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_free.restype = None
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_ctx_output_set_flags.restype = None
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    return library
