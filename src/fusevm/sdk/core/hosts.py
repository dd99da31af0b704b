"""Calls about hosts."""

from fusevm.model.errors import HostNotFound
from fusevm.sdk.core.exchange import Call, Request, Retry, get, json_reader, make_target, post, read_nothing
from fusevm.wire.rest import HostBody, HostPage
from fusevm.wire.rest_fleet import RegisterHost

#: The server asks the host who it is, and waits at most 10 s.
REGISTER_TIMEOUT_S = 30.0


def register_host(host: RegisterHost) -> Call[HostBody]:
    """Register a host, or update a known one. Safe to repeat."""
    return Call(
        request=post(make_target("hosts"), host),
        read=json_reader(HostBody),
        retry=Retry.ALWAYS,
        timeout_s=REGISTER_TIMEOUT_S,
    )


def list_hosts(*, limit: int | None = None, cursor: str = "") -> Call[HostPage]:
    """One page of hosts."""
    return get(make_target("hosts", query={"limit": limit, "cursor": cursor}), HostPage)


def get_host(host_id: str) -> Call[HostBody]:
    """One host."""
    return get(make_target("hosts", host_id), HostBody)


def cordon_host(host_id: str) -> Call[None]:
    """Place nothing new there. Safe to repeat."""
    return _act(host_id, "cordon")


def uncordon_host(host_id: str) -> Call[None]:
    """Place there again; also ends a drain. Safe to repeat."""
    return _act(host_id, "uncordon")


def drain_host(host_id: str) -> Call[None]:
    """Cordon, and drain every environment there. Safe to repeat."""
    return _act(host_id, "drain")


def delete_host(host_id: str, *, force: bool = False) -> Call[None]:
    """Forget a host without environments; a lost or refusing one with them, by `force`. Safe to repeat."""
    target = make_target("hosts", host_id, query={"force": True if force else None})
    request = Request(method="DELETE", target=target)
    return Call(request=request, read=read_nothing, retry=Retry.ALWAYS, done_by=(HostNotFound,))


def _act(host_id: str, action: str) -> Call[None]:
    request = post(make_target("hosts", host_id, query={"action": action}))
    return Call(request=request, read=read_nothing, retry=Retry.ALWAYS)
