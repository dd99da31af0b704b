"""A user without rights, for what reads files of strangers: unpacking layers, writing file systems, asking registries.

As root such work is done as a user of its own, who owns nothing but the folder that the work is in. Programs are
wrapped in setpriv(1); our own code gives its rights up itself (`drop_rights`), since the interpreter may lie where
only root gets. Without root there is nothing to give up.

Owns: how rights are given up. Must not: know what for.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path
from typing import Final

#: Below the users of machines and the control plane (`HostConfig.uid_base`).
WORKER_UID: Final = 199_998
#: linux/prctl.h, linux/sched.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWNET: Final = 0x4000_0000
_CLONE_NEWIPC: Final = 0x0800_0000
_MEMORY_BYTES: Final = 4 << 30


def without_rights(words: list[str | Path], *, has_network: bool = False) -> list[str | Path]:
    """The words that run a program as the worker, from the current directory on; by itself in its network, unless that
    is what it is run for."""
    if os.geteuid() != 0:
        return words
    apart = [] if has_network else ["unshare", "--net", "--"]
    ids = [f"--reuid={WORKER_UID}", f"--regid={WORKER_UID}", "--clear-groups"]
    ending = ["--pdeathsig", "KILL"]  # nothing goes on when a daemon is killed
    return [*apart, "setpriv", *ids, *ending, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--", *words]


def make_workplace(folder: Path) -> None:
    """Make a folder that the worker may write to, and nobody else may enter."""
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder, WORKER_UID, WORKER_UID)


def drop_rights(*, max_file_bytes: int) -> None:
    """Give up for good: root, the network, new programs, more memory and larger files than the work needs.

    Relative paths below the current directory stay reachable. Raises OSError when one of them cannot be given up: then
    the work must not be begun.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        # Each by itself: a filter that forbids one kind of namespace refuses every call that names it.
        for flag, name in ((_CLONE_NEWNET, "network"), (_CLONE_NEWIPC, "IPC")):
            if libc.unshare(flag) != 0:
                problem = os.strerror(number := ctypes.get_errno())
                raise OSError(number, f"no {name} namespace of its own for what reads layers: {problem}")
        os.setgroups([])
        os.setresgid(WORKER_UID, WORKER_UID, WORKER_UID)
        os.setresuid(WORKER_UID, WORKER_UID, WORKER_UID)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    # After the change of user, which would undo it.
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    os.umask(0o077)
