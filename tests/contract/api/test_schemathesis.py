"""Everything that the OpenAPI document allows, and what it forbids, is asked of a real server, and the answers are held
to the document: no undeclared status, header, type or shape, and no failure of the server's own.

Deterministic: the same requests in every run. What is asked in the course of a longer life: `test_schemathesis_walks`.
`test_an_answer_that_the_document_does_not_declare_is_found` shows that the checks can fail.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fuzzing import (
    CONFIG,
    DOCUMENT,
    WITH_MACHINES,
    Possible,
    checks_of,
    headers_of,
    number_of,
    read,
    server,
    settings_of,
)
from schemathesis.core.failures import FailureGroup

from fusevm.testing.postgres import PostgresServer
from fusevm.wire.routes import ROUTES, Route, Scope

#: Requests per operation to a server with pretended machines, besides those that schemathesis makes of every bound in
#: the document; and to one that keeps everything in PostgreSQL and has machines in which everything works.
ON_STUB, ON_MACHINES = 12, 6
MASTER = headers_of("stub")
api = read(DOCUMENT)
everything = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG)


class Known:
    """Ids of things that exist, so that not everything is answered by 404."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._possible = Possible()
        self.ids: dict[str, str] = {}

    def renew(self) -> None:
        """Make what the requests before have destroyed."""
        post = self._http.post
        (host,) = [host for host in self._http.get("/v1/hosts").json()["hosts"] if host["id"] in ("stub", "default")]
        assert post(f"/v1/hosts/{host['id']}?action=uncordon").status_code == 204
        self._http.delete("/v1/environments/fuse-known")
        made = post("/v1/environments", json={"task_id": "known"})
        assert made.status_code == 201, made.text
        snapshot = post("/v1/environments/fuse-known/snapshots", json={})
        process = post("/v1/environments/fuse-known/processes", json={"cmd": ["cat"], "stdin": True})
        key = post("/v1/api-keys", json={"label": "known"}).json()
        self.ids = {"/v1/environments/": "fuse-known", "/v1/api-keys/": key["id"], "/v1/hosts/": host["id"]}
        if snapshot.status_code == 201:
            self.ids["/v1/snapshots/"] = snapshot.json()["id"]
        if process.status_code == 201:
            self.ids["/v1/environments/{id}/processes/"] = str(process.json()["pid"])

    def put_into(self, case: Any) -> bool:
        """Make every other request be about one of them, and every other one possible. Has it another body now?"""
        number = number_of(case)
        for prefix, id_ in self.ids.items():
            name = "pid" if prefix.endswith("processes/") else "id"
            if case.operation.path.startswith(f"{prefix}{{{name}}}") and number % 2:
                case.path_parameters[name] = id_
        return self._possible.make(case, number // 2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[str]:
    with server("stub", tmp_path_factory.mktemp("stub"), postgres_server) as found:
        yield found


@pytest.fixture(scope="module")
def url_with_machines(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[str]:
    with server("postgres", tmp_path_factory.mktemp("machines"), postgres_server) as found:
        yield found


def ask(case: Any, url: str, known: Known, kind: str) -> None:
    """Ask, about something that exists, and check the answer."""
    has_our_body = known.put_into(case)
    response = case.call(base_url=url, headers=MASTER)
    operation = case.operation.definition.raw
    is_strict = "requestBody" in operation and "_or_" not in operation["operationId"] and not has_our_body
    case.validate_response(response, checks=checks_of(kind, is_strict=is_strict))


@pytest.fixture
def known(url: str) -> Iterator[Known]:
    yield from _known(url)


@pytest.fixture
def known_with_machines(url_with_machines: str) -> Iterator[Known]:
    yield from _known(url_with_machines)


def _known(url: str) -> Iterator[Known]:
    with httpx.Client(base_url=url, headers=MASTER, timeout=30) as http:
        found = Known(http)
        found.renew()
        yield found


@api.parametrize()
@settings_of(max_examples=ON_STUB)
def test_every_answer_is_as_the_document_says(case: Any, url: str, known: Known) -> None:
    ask(case, url, known, "stub")


@api.parametrize()
@settings_of(max_examples=ON_MACHINES)
def test_every_answer_of_machines_and_of_postgresql_is_so_too(
    case: Any, url_with_machines: str, known_with_machines: Known
) -> None:
    ask(case, url_with_machines, known_with_machines, "postgres")


GUARDED = [route for route in ROUTES if route.scope is not Scope.OPEN]


@pytest.fixture(scope="module")
def weak_key(url: str) -> str:
    """A key that may do nothing but what this test does not ask for."""
    with httpx.Client(base_url=url, headers=MASTER, timeout=30) as http:
        made = http.post("/v1/api-keys", json={"tenant": "t", "scopes": ["snapshots"]})
        assert made.status_code == 201, made.text
        return str(made.json()["key"])


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: route.name)
def test_without_the_right_every_operation_says_so(url: str, weak_key: str, route: Route) -> None:
    ids = dict.fromkeys(re.findall(r"{(\w+)}", route.path), "x")
    query = {route.selector: route.value} if route.selector else {}
    for credentials, status in (({}, 401), ({"authorization": f"Bearer {weak_key}"}, 403)):
        if status == 403 and route.scope is Scope.SNAPSHOTS:
            continue
        case = everything[route.path][route.method].Case(path_parameters=ids, query=query)
        response = case.call(base_url=url, headers=credentials)
        assert response.status_code == status, response.text
        case.validate_response(response, checks=checks_of("stub"))


# -- the checks ----------------------------------------------------------------------------------------------------


def test_an_answer_that_the_document_does_not_declare_is_found(url: str) -> None:
    changed = copy.deepcopy(DOCUMENT)
    del changed["paths"]["/v1/environments/{id}"]["get"]["responses"]["404"]
    case = read(changed)["/v1/environments/{id}"]["GET"].Case(path_parameters={"id": "fuse-nothing"})
    response = case.call(base_url=url, headers=MASTER)
    with pytest.raises(FailureGroup):
        case.validate_response(response, checks=checks_of("stub"))


@pytest.mark.parametrize(
    ("status", "reason", "with_machines"),
    [(503, "store_unreachable", False), (503, "store_full", False), (504, "timeout", True), (500, "internal", False)],
)
def test_a_failure_that_cannot_honestly_occur_is_found(status: int, reason: str, *, with_machines: bool) -> None:
    """Also where the document declares its status."""
    case = everything["/v1/environments"]["POST"].Case(body={"task_id": "t"}, media_type="application/json")
    error = {"code": "unavailable", "message": "no", "request_id": "r", "details": {"reason": reason}}
    answer = httpx.Response(status, json={"error": error}, request=httpx.Request("POST", "http://x/v1/environments"))
    for kind in ("stub", "open", "machines", "postgres"):
        check, *_ = checks_of(kind)
        is_honest = with_machines and kind in WITH_MACHINES
        with contextlib.nullcontext() if is_honest else pytest.raises(AssertionError, match=reason):
            check(None, answer, case)


def test_a_body_of_another_shape_is_found(url: str) -> None:
    changed = copy.deepcopy(DOCUMENT)
    changed["components"]["schemas"]["Health"]["properties"]["status"] = {"type": "integer"}
    case = read(changed)["/health"]["GET"].Case()
    with pytest.raises(FailureGroup, match="violates schema"):
        case.validate_response(case.call(base_url=url), checks=checks_of("stub"))
