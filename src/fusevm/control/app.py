"""The ASGI application: the route table, joined to handlers by name."""

from fusevm.control.cors import Cors
from fusevm.control.gate import Gate
from fusevm.control.handlers import (
    commands,
    environments,
    guest,
    hosts,
    keys,
    logs,
    service,
    session,
    snapshots,
    sockets,
    streams,
)
from fusevm.control.middleware import Edge, Handler, SocketHandler
from fusevm.control.plane import Plane
from fusevm.control.router import Router
from fusevm.wire.routes import ROUTES

_MODULES = (commands, environments, hosts, keys, logs, service, snapshots, streams)


def build_app(plane: Plane) -> Edge:
    """The application of one control plane."""
    cors = Cors(plane.config.cors_origins)
    gate = Gate(plane, cors)
    return Edge(plane, Router(ROUTES), gate, cors, http_handlers(gate), socket_handlers())


def http_handlers(gate: Gate) -> dict[str, Handler]:
    """A handler for every row that is built. Raises StopIteration for a row without one."""
    made = {**guest.handlers(ROUTES), **session.handlers(gate)}
    found: dict[str, Handler] = {}
    for route in ROUTES:
        if route.unimplemented or route.is_websocket:
            continue
        ours = (getattr(module, route.name) for module in _MODULES if hasattr(module, route.name))
        found[route.name] = made.get(route.name) or next(ours)
    return found


def socket_handlers() -> dict[str, SocketHandler]:
    """A handler for every WebSocket row."""
    return {"exec_stream": sockets.exec_stream, "shell_stream": sockets.shell_stream}
