"""What the kernel says instead of a list of connections is not taken for the end of the list."""

import os
import socket
import struct
import subprocess
import sys

import pytest

from fusevm.host.net import conntrack

CUT = """
import asyncio
from fusevm.host.net.conntrack import cut
try:
    print(asyncio.run(cut(lambda _connection: True)))
except PermissionError as e:
    print(e)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to go without")
def test_connections_that_may_not_be_listed_are_an_error():
    words = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-all", sys.executable, "-c", CUT]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert "the connections could not be listed: Operation not permitted" in done.stdout


@pytest.mark.parametrize(("kind", "code"), [(2, -105), (3, -4), (2, -1)])
def test_a_list_that_breaks_off_is_an_error(kind: int, code: int):
    """ERROR and DONE both carry an errno (netlink(7))."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, kernel:
        kernel.send(struct.pack("=IHHIIi", 20, kind, 0, 1, 0, code))
        with pytest.raises(OSError, match="could not be listed") as caught:
            list(conntrack._dump(ours))
        assert caught.value.errno == -code


def test_a_whole_list_is_none():
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, kernel:
        kernel.send(struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0))
        assert list(conntrack._dump(ours)) == []
