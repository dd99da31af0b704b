"""Finds the route of a request in the table: by segments of the raw path, each percent-decoded by itself.

Written here because ids may contain an encoded slash, which a router on the decoded path would split, and because a
path's rows must be known together for a complete `Allow`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from fusevm.model.errors import MethodNotAllowed, RouteNotFound, UnknownAction
from fusevm.wire.routes import Payload, Route

_NAME = re.compile(r"{(\w+)}")


class Found(NamedTuple):
    """A route and the segments that fill its braces."""

    route: Route
    params: dict[str, str]


class _Node:
    """One position in the tree of paths."""

    def __init__(self) -> None:
        self.literal: dict[str, _Node] = {}
        self.any: _Node | None = None
        self.methods: dict[str, list[Route]] = {}
        self.socket: Route | None = None


class Router:
    """All routes of the table."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Node()
        for route in routes:
            node = self._root
            for segment in route.path.split("/")[1:]:
                node = self._child(node, segment)
            if route.is_websocket:
                node.socket = route
            else:
                node.methods.setdefault(route.method, []).append(route)

    @staticmethod
    def _child(node: _Node, segment: str) -> _Node:
        if _NAME.fullmatch(segment):
            node.any = node.any or _Node()
            return node.any
        return node.literal.setdefault(segment, _Node())

    def find(self, method: str, raw_path: bytes, selectors: dict[str, str]) -> Found:
        """The route of an HTTP request. Raises RouteNotFound, MethodNotAllowed, UnknownAction."""
        path = raw_path.decode("latin-1")
        node, values = self._walk(raw_path)
        if node is None or not (node.methods or node.socket):
            raise RouteNotFound(method=method, path=path)
        rows = node.methods.get(method) or (self._for_head(node) if method == "HEAD" else None)
        if rows is None and method == "GET" and node.socket is not None:
            rows = [node.socket]
        if not rows:
            raise MethodNotAllowed(method=method, path=path, allowed=", ".join(allowed(node)))
        return Found(_select(rows, selectors), _named(rows[0], values))

    def methods(self, raw_path: bytes) -> list[str]:
        """Every method that a path takes. Raises RouteNotFound."""
        node, _ = self._walk(raw_path)
        if node is None or not (node.methods or node.socket):
            raise RouteNotFound(method="OPTIONS", path=raw_path.decode("latin-1"))
        return allowed(node)

    def find_socket(self, raw_path: bytes) -> Found:
        """The route of a WebSocket. Raises RouteNotFound."""
        node, values = self._walk(raw_path)
        if node is None or node.socket is None:
            raise RouteNotFound(method="GET (WebSocket)", path=raw_path.decode("latin-1"))
        return Found(node.socket, _named(node.socket, values))

    @staticmethod
    def _for_head(node: _Node) -> list[Route] | None:
        """HEAD is GET without the body where the answer is at hand."""
        rows = node.methods.get("GET")
        return rows if rows and rows[0].gives in (Payload.JSON, Payload.TEXT) and not rows[0].unimplemented else None

    def _walk(self, raw_path: bytes) -> tuple[_Node | None, list[str]]:
        node: _Node | None = self._root
        values: list[str] = []
        for raw in raw_path.split(b"/")[1:]:
            try:
                segment = unquote_to_bytes(raw).decode()
            except UnicodeDecodeError:
                return None, values
            following = node.literal.get(segment) if node is not None else None
            if following is None and node is not None and node.any is not None and segment:
                values.append(segment)
                following = node.any
            node = following
            if node is None:
                return None, values
        return node, values


def allowed(node: _Node) -> list[str]:
    """Every method that a path takes."""
    found = set(node.methods) | ({"GET"} if node.socket is not None else set())
    if Router._for_head(node) is not None:
        found.add("HEAD")
    return sorted(found | {"OPTIONS"})


def _select(rows: list[Route], selectors: dict[str, str]) -> Route:
    selector = rows[0].selector
    if not selector:
        return rows[0]
    asked = selectors.get(selector, "")
    for row in rows:
        if row.value == asked:
            return row
    raise UnknownAction(action=asked, known=", ".join(row.value for row in rows))


def _named(route: Route, values: list[str]) -> dict[str, str]:
    return dict(zip(_NAME.findall(route.path), values, strict=True))
