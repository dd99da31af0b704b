"""Errors that only a client can see: nobody answered, or what arrived is not what was sent.

They stand beside the server's errors in the one tree of `model.errors`, so that callers catch a single family.
"""

from fusevm.model.errors import Error, Unavailable


class ServerUnreachable(Unavailable):
    """No connection could be made; the request was surely not carried out."""

    reason = "server_unreachable"
    template = "Nothing answers at {url} ({problem}); is the server running there?"
    url: str
    problem: str


class ConnectionLost(Unavailable):
    """The connection broke after the request had left; whether it was carried out is unknown."""

    reason = "connection_lost"
    template = "The connection to {url} broke ({problem}); whether the request was carried out is unknown"
    url: str
    problem: str


class TransferCorrupt(Unavailable):
    """A file arrived with other bytes than were sent. What arrived was not kept."""

    reason = "transfer_corrupt"
    template = "{path} arrived damaged ({problem}); copy it again"
    path: str
    problem: str


class ProtocolBroken(Error):
    """The other side does not speak this API: another program on that port, or another version."""

    reason = "protocol_broken"
    template = "{url} does not answer like a Fuse server ({problem}); check the address and `fuse version`"
    url: str
    problem: str
