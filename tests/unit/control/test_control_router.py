"""Finding routes."""

import json
import re

import pytest

from fusevm.control.router import Router
from fusevm.model.errors import MethodNotAllowed, RouteNotFound, UnknownAction
from fusevm.wire.openapi import render_openapi
from fusevm.wire.routes import ROUTES, Payload, errors_of

ROUTER = Router(ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_every_row_is_found(route) -> None:  # type: ignore[no-untyped-def]
    path = route.path.replace("{id}", "a%2Fb").replace("{pid}", "7").replace("{port}", "80").encode()
    if route.is_websocket:
        found = ROUTER.find_socket(path)
    else:
        found = ROUTER.find(route.method, path, {route.selector: route.value})
    assert found.route is route
    assert found.params.get("id", "a/b") == "a/b"


def test_a_literal_segment_wins() -> None:
    assert ROUTER.find("GET", b"/v1/snapshots/resolve", {}).route.name == "resolve_snapshot"
    assert ROUTER.find("GET", b"/v1/snapshots/other", {}).route.name == "get_snapshot"


@pytest.mark.parametrize(
    "path", [b"/v1/hosts/", b"/v1/hosts//", b"/v1/hosts/%ff", b"/v1/hosts/a/b", b"//v1/hosts", b""]
)
def test_what_is_no_route(path: bytes) -> None:
    with pytest.raises(RouteNotFound):
        ROUTER.find("GET", path, {})
    with pytest.raises(RouteNotFound):
        ROUTER.find_socket(path)


def test_a_wrong_method_names_the_right_ones() -> None:
    with pytest.raises(MethodNotAllowed) as caught:
        ROUTER.find("TRACE", b"/v1/environments/a/archive", {})
    assert caught.value.allowed == "GET, OPTIONS, PUT"


def test_head_only_where_the_answer_is_at_hand() -> None:
    assert ROUTER.find("HEAD", b"/v1/hosts", {}).route.name == "list_hosts"
    with pytest.raises(MethodNotAllowed):
        ROUTER.find("HEAD", b"/v1/events", {})


def test_an_unknown_selector_is_refused() -> None:
    with pytest.raises(UnknownAction):
        ROUTER.find("POST", b"/v1/environments/a/files", {"op": "burn"})


def test_the_document_has_every_route_and_every_reason() -> None:
    document = render_openapi("1.2.3")
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        statuses = set(operation["responses"])
        if not route.unimplemented:
            assert {str(status) for status in route.statuses} <= statuses
        for cls in errors_of(route):
            if str(cls.status) not in {str(status) for status in route.statuses}:
                assert f"`{cls.reason}`" in operation["responses"][str(cls.status)]["description"]
        if route.takes is Payload.JSON and route.request is not None:
            assert "application/json" in operation["requestBody"]["content"]
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))


def test_references_in_the_document_lead_somewhere() -> None:
    document = render_openapi("1")
    for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
