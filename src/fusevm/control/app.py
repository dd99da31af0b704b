"""The ASGI application: the route table, joined to handlers by name."""

from fusevm.control.gate import Gate
from fusevm.control.handlers import commands, environments, guest, service, sockets, streams
from fusevm.control.middleware import Edge, Handler, SocketHandler
from fusevm.control.plane import Plane
from fusevm.control.router import Router
from fusevm.wire.routes import ROUTES

_MODULES = (commands, environments, service, streams)


def build_app(plane: Plane) -> Edge:
    """The application of one control plane."""
    return Edge(plane, Router(ROUTES), Gate(plane.config), http_handlers(), socket_handlers())


def http_handlers() -> dict[str, Handler]:
    """A handler for every row that is built. Raises KeyError for a row without one."""
    relayed = guest.handlers(ROUTES)
    found: dict[str, Handler] = {}
    for route in ROUTES:
        if route.unimplemented or route.is_websocket:
            continue
        ours = (getattr(module, route.name) for module in _MODULES if hasattr(module, route.name))
        found[route.name] = relayed.get(route.name) or next(ours)
    return found


def socket_handlers() -> dict[str, SocketHandler]:
    """A handler for every WebSocket row."""
    return {"exec_stream": sockets.exec_stream, "shell_stream": sockets.shell_stream}
