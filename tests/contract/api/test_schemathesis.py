"""Everything that the OpenAPI document allows, and what it forbids, is asked of a real server, and the answers are held
to the document: no undeclared status, header, type or shape, and no failure of the server's own.

Deterministic: the same requests in every run. `test_an_answer_that_the_document_does_not_declare_is_found` shows that
the checks can fail.
"""

import copy
import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from control_process import serving
from hypothesis import HealthCheck, Phase, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

import fusevm
from fusevm.wire.openapi import render_openapi
from fusevm.wire.routes import ROUTES, Route, Scope

TOKEN = "schemathesis-token"
#: Requests per operation, besides those that schemathesis makes of every bound in the document.
EXAMPLES = 20
#: Length of the walk along the links.
STEPS, SEED = 300, 1
#: Failures of the server's own that the document may declare: not built, and not now.
DECLARED_FAILURES = (501, 503, 504)
DOCUMENT = render_openapi(fusevm.__version__)
SETTINGS = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@schemathesis.serializer("application/x-tar")
def bytes_as_they_are(_ctx: Any, value: Any) -> bytes:
    """Whatever is thought of as an archive."""
    return bytes(value) if isinstance(value, bytes | bytearray) else str(value).encode("utf-8", "surrogatepass")


@schemathesis.check
def no_failure_of_the_server(_ctx: Any, response: Any, case: Any) -> None:
    """Nothing is the server's fault; what the document declares as not built or not now is none."""
    declared = case.operation.definition.raw["responses"]
    is_fault = response.status_code >= 500
    assert not is_fault or (response.status_code in DECLARED_FAILURES and str(response.status_code) in declared), (
        f"{response.status_code}: {response.text[:500]}"
    )


CHECKS = [
    no_failure_of_the_server,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]
#: Answers to a body that the document forbids. Rows that share a path have bodies of several kinds, and the contract
#: takes a page size that cannot be read for the default.
STRICT = [*CHECKS, checks.negative_data_rejection]


#: A stream is read up to its first message. That of everything has none until something happens, and is left to
#: `test_event_streams`.
CONFIG = schemathesis.Config.from_dict({"request-timeout": 60.0, "max-stream-events": 1})
api_with_everything = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG)
api = api_with_everything.exclude(operation_id="stream_events")


class Known:
    """Ids of things that exist, so that not everything is answered by 404."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.ids: dict[str, str] = {}

    def renew(self) -> None:
        """Make what the requests before have destroyed."""
        post = self._http.post
        assert post("/v1/hosts/stub?action=uncordon").status_code == 204
        self._http.delete("/v1/environments/fuse-known")
        made = post("/v1/environments", json={"task_id": "known"})
        assert made.status_code == 201, made.text
        snapshot = post("/v1/environments/fuse-known/snapshots", json={}).json()
        key = post("/v1/api-keys", json={"label": "known"}).json()
        self.ids = {
            "/v1/environments/": "fuse-known",
            "/v1/snapshots/": snapshot["id"],
            "/v1/api-keys/": key["id"],
            "/v1/hosts/": "stub",
        }

    def put_into(self, case: Any) -> None:
        """Make every other request be about one of them."""
        number = hashlib.sha256(repr((case.path_parameters, case.query, case.body)).encode()).digest()[0]
        for prefix, id_ in self.ids.items():
            # Without its host there would be no environments any more.
            is_last_host = case.operation.label == "DELETE /v1/hosts/{id}"
            if case.operation.path.startswith(prefix + "{id}") and number % 2 and not is_last_host:
                case.path_parameters["id"] = id_


OPTIONS = ("--auth-token", TOKEN, "--wait-s", "2")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("api"), *OPTIONS) as server:
        yield server.url
        assert server.end() == 0


@pytest.fixture
def fresh_url(tmp_path: Path) -> Iterator[str]:
    """Of a server that nobody has asked anything yet."""
    with serving(tmp_path, *OPTIONS) as server:
        yield server.url


@pytest.fixture
def known(url: str) -> Iterator[Known]:
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=30) as http:
        found = Known(http)
        found.renew()
        yield found


@api.parametrize()
@SETTINGS
def test_every_answer_is_as_the_document_says(case: Any, url: str, known: Known) -> None:
    known.put_into(case)
    response = case.call(base_url=url, headers={"authorization": f"Bearer {TOKEN}"})
    operation = case.operation.definition.raw
    is_strict = "requestBody" in operation and "_or_" not in operation["operationId"]
    case.validate_response(response, checks=STRICT if is_strict else CHECKS)


GUARDED = [route for route in ROUTES if route.scope is not Scope.OPEN]


@pytest.fixture(scope="module")
def weak_key(url: str) -> str:
    """A key that may do nothing but what this test does not ask for."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=30) as http:
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
        case = api_with_everything[route.path][route.method].Case(path_parameters=ids, query=query)
        response = case.call(base_url=url, headers=credentials)
        assert response.status_code == status, response.text
        case.validate_response(response, checks=CHECKS)


# -- what follows from what ----------------------------------------------------------------------------------------


class Made(NamedTuple):
    """An answer that has links."""

    label: str
    status: str
    #: Ids in the path of the request.
    ids: dict[str, str]
    body: Any

    @property
    def links(self) -> dict[str, Any]:
        path = self.label.partition(" ")[2]
        operation = DOCUMENT["paths"][path][self.label.partition(" ")[0].lower()]
        return dict(operation["responses"].get(self.status, {}).get("links", {}))


#: Bodies with which operations can succeed, by link; others get an empty one.
BODIES: dict[str, Any] = {
    "exec_command": {"cmd": ["true"]},
    "start_process": {"cmd": ["true"]},
    "create_snapshot": {"comment": "made"},
    "signal_process": {"signal": "TERM"},
    "stat_path": {"path": "/tmp"},
    "use_computer": {"action": "screenshot"},
}


class Guide:
    """Follows one link after another, as a program would that knows nothing but the document; checks every answer."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, label: str, body: Any = None, ids: Mapping[str, str] = {}, **query: str) -> tuple[Made, int]:
        """One request: what came of it, and its status."""
        method, path = label.split(" ", 1)
        described = DOCUMENT["paths"][path][method.lower()]
        options = {} if body is None else {"body": body, "media_type": next(iter(described["requestBody"]["content"]))}
        case = api[path][method].Case(path_parameters=dict(ids), query=query, **options)
        response = case.call(base_url=self._url, headers={"authorization": f"Bearer {TOKEN}"})
        case.validate_response(response, checks=CHECKS)
        is_json = response.headers.get("content-type", [""])[0].startswith("application/json")
        content = response.json() if is_json and response.content else None
        return Made(label, str(response.status_code), dict(ids), content), response.status_code

    def follow(self, made: Made, link: str) -> tuple[Made, int]:
        """What a link of an answer leads to."""
        described = made.links[link]
        label, operation = _operation(described["operationId"])
        values = {name: _value(made, text) for name, text in described["parameters"].items()}
        places = {param["name"]: param for param in operation["parameters"]}
        ids = {name: value for name, value in values.items() if places[name]["in"] == "path"}
        query = {name: value for name, value in values.items() if places[name]["in"] == "query"}
        query |= {name: "/tmp/x" for name, param in places.items() if name == "path" and param["in"] == "query"}
        body = BODIES.get(link, {})
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            body = b"contents" if content else None
        return self.ask(label, body, ids, **query)


def _operation(operation_id: str) -> tuple[str, dict[str, Any]]:
    """Where an operation is in the document."""
    return next(
        (f"{method.upper()} {path}", operation)
        for path, operations in DOCUMENT["paths"].items()
        for method, operation in operations.items()
        if operation["operationId"] == operation_id
    )


def _value(made: Made, text: str) -> str:
    """What a link's expression stands for."""
    if text.startswith("$response.body#/"):
        return str(made.body[text.removeprefix("$response.body#/")])
    return made.ids[text.removeprefix("$request.path.")] if text.startswith("$request.path.") else text


def test_links_lead_to_whatever_can_be_done_with_what_was_made(fresh_url: str) -> None:
    """A walk at random, the same in every run: what is made is read, used, changed and deleted, in any order."""
    chance, guide = random.Random(SEED), Guide(fresh_url)
    made: list[Made] = []
    followed: dict[str, set[int]] = {}
    for number in range(STEPS):
        if not made or chance.random() < 0.1:
            answer, status = guide.ask("POST /v1/environments", {"task_id": f"walk-{number}"})
            link = "create_environment"
        else:
            thing = chance.choice(made[-6:])
            link = chance.choice(sorted(thing.links))
            answer, status = guide.follow(thing, link)
        followed.setdefault(link, set()).add(status)
        made += [answer] if answer.links else []
    succeeded = {link for link, statuses in followed.items() if min(statuses) < 300}
    assert {"create_environment", "exec_command", "create_snapshot", "delete_environment"} <= succeeded
    linked = {link for thing in made for link in thing.links}
    assert len(followed) > len(linked) / 2, "most links are never followed"


def test_the_links_tell_the_whole_life_of_an_environment_and_its_snapshot(fresh_url: str) -> None:
    guide = Guide(fresh_url)
    env, status = guide.ask("POST /v1/environments", {"task_id": "linked"})
    assert status == 201
    assert guide.follow(env, "get_environment")[0].body == env.body
    assert guide.follow(env, "exec_command")[0].body["exit_code"] == 0
    snapshot, status = guide.follow(env, "create_snapshot")
    assert status == 201
    assert guide.follow(snapshot, "get_snapshot")[0].body == snapshot.body
    assert guide.follow(snapshot, "restore_snapshot")[1] == 204
    assert guide.follow(env, "get_environment")[0].body["state"] == "running"
    assert guide.follow(snapshot, "delete_snapshot")[1] == 204
    assert guide.follow(snapshot, "get_snapshot")[1] == 404
    assert guide.follow(env, "rotate_token")[1] == 204
    assert guide.follow(env, "drain_environment")[0].body["state"] == "draining"
    assert guide.follow(env, "delete_environment")[1] == 204
    assert guide.follow(env, "get_environment")[1] == 404
    key, status = guide.ask("POST /v1/api-keys", {"label": "linked"})
    assert status == 201
    assert guide.follow(key, "revoke_api_key")[1] == 204


# -- the checks ----------------------------------------------------------------------------------------------------


def test_an_answer_that_the_document_does_not_declare_is_found(url: str) -> None:
    changed = copy.deepcopy(DOCUMENT)
    del changed["paths"]["/v1/environments/{id}"]["get"]["responses"]["404"]
    lying = schemathesis.openapi.from_dict(changed, config=CONFIG)
    case = lying["/v1/environments/{id}"]["GET"].Case(path_parameters={"id": "fuse-nothing"})
    response = case.call(base_url=url, headers={"authorization": f"Bearer {TOKEN}"})
    with pytest.raises(FailureGroup):
        case.validate_response(response, checks=CHECKS)


def test_a_body_of_another_shape_is_found(url: str) -> None:
    changed = copy.deepcopy(DOCUMENT)
    changed["components"]["schemas"]["Health"]["properties"]["status"] = {"type": "integer"}
    case = schemathesis.openapi.from_dict(changed, config=CONFIG)["/health"]["GET"].Case()
    with pytest.raises(FailureGroup, match="violates schema"):
        case.validate_response(case.call(base_url=url), checks=CHECKS)
