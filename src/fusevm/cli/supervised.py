"""A daemon that `fuse up` has started ends with it, even when it is killed: its end closes a pipe that we read.

A death signal (prctl) would be forgotten when the control plane drops its privileges.
"""

import os
import signal
import threading
from collections.abc import Mapping

#: Number of the descriptor of the pipe.
VARIABLE = "FUSE_SUPERVISOR_FD"


def follow_supervisor(environ: Mapping[str, str]) -> None:
    """Send ourselves SIGTERM when the supervisor has gone. Does nothing without one."""
    number = environ.get(VARIABLE, "")
    if not number.isdecimal():
        return
    fd = int(number)
    os.set_inheritable(fd, False)
    os.environ.pop(VARIABLE, None)
    threading.Thread(target=_wait, args=(fd,), daemon=True, name="supervisor-watch").start()


def _wait(fd: int) -> None:
    while os.read(fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
