"""Idempotency-Key holds for every POST, present and future, since it is the edge's and not the handlers'."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import httpx
import pytest
import websockets
from control_harness import Running, running, until
from starlette.responses import Response, StreamingResponse

from fusevm.control import idempotency
from fusevm.control.call import Call, reply
from fusevm.control.cors import Cors
from fusevm.control.gate import Gate
from fusevm.control.middleware import Edge, Handler
from fusevm.control.plane import Plane
from fusevm.control.router import Router
from fusevm.control.secrets import Sealer
from fusevm.model.errors import BadField, HostUnreachable, Internal, SnapshotFailed
from fusevm.wire.routes import ROUTES, Route

TOKEN = "master-token"
MASTER = {"Authorization": f"Bearer {TOKEN}"}
POSTS = [route for route in ROUTES if route.method == "POST" and not route.unimplemented]
TAKING = [route for route in POSTS if route.takes_key]


def _reason(answer: httpx.Response) -> str:
    return answer.json()["error"]["details"]["reason"]


def _url(route: Route) -> str:
    path = route.path.replace("{id}", "fuse-t1").replace("{pid}", "1")
    return path + (f"?{route.selector}={route.value}" if route.selector else "")


def _client(server: Running, handler: Handler, sealer: Sealer | None = None) -> httpx.AsyncClient:
    """The real edge in front of one handler for everything."""
    plane = replace(server.plane, sealer=sealer or server.plane.sealer)
    cors = Cors(())
    edge = Edge(plane, Router(ROUTES), Gate(plane, cors), cors, {route.name: handler for route in ROUTES}, {})
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=edge), base_url="http://localhost")


@pytest.mark.parametrize("route", TAKING, ids=lambda route: route.name)
async def test_every_post_acts_once_under_a_key(route: Route) -> None:
    calls = []

    async def handler(_plane: Plane, call: Call) -> Response:
        calls.append(await call.body())
        return reply({"number": len(calls)}, 201)

    async with running(checked=False) as server, _client(server, handler) as http:

        async def post(key: str, body: bytes = b"{}", query: Mapping[str, str] | None = None) -> httpx.Response:
            url = httpx.URL(_url(route)).copy_merge_params(query or {})
            return await http.post(url, content=body, headers={"Idempotency-Key": key})

        first, again = await post("k"), await post("k")
        assert (first.status_code, first.content) == (again.status_code, again.content) == (201, b'{"number":1}')
        assert ("idempotency-replayed" in first.headers, again.headers["idempotency-replayed"]) == (False, "true")
        for other in (await post("k", b'{"a":1}'), await post("k", query={"uid": "u"})):
            assert (other.status_code, _reason(other)) == (409, "idempotency_key_reused")
        assert (await post("k2")).json() == {"number": 2}
        assert calls == [b"{}", b"{}"]


@pytest.mark.parametrize("route", [route for route in POSTS if not route.takes_key], ids=lambda route: route.name)
async def test_a_route_that_streams_refuses_a_key_and_says_why(route: Route) -> None:
    async with running() as server:
        answer = await server.http.post(_url(route), content=b"x", headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "Idempotency-Key")
        assert "streams" in answer.json()["error"]["message"]


async def test_a_websocket_refuses_a_key() -> None:
    async with running() as server:
        await server.create()
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t1/shell"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url, additional_headers={"Idempotency-Key": "k"})
        assert caught.value.response.status_code == 400


@pytest.mark.parametrize(
    ("error", "calls"), [(BadField(field="x", problem="y"), 2), (HostUnreachable(id="h", problem="p"), 2)]
)
async def test_an_error_before_any_effect_frees_the_key(error: Exception, calls: int) -> None:
    assert await _calls_of(error) == calls


@pytest.mark.parametrize("error", [Internal(problem="x"), ZeroDivisionError("a bug")])
async def test_an_error_after_a_possible_effect_is_the_answer_from_then_on(error: Exception) -> None:
    assert await _calls_of(error) == 1


async def _calls_of(error: Exception) -> int:
    """How often a handler that fails is called by two equal requests, which get equal answers."""
    calls = []

    async def handler(_plane: Plane, _call: Call) -> Response:
        calls.append(1)
        raise error

    async with running(checked=False) as server, _client(server, handler) as http:
        answers = [await http.post("/v1/environments", headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert answers[0].status_code == answers[1].status_code
        assert answers[0].content == answers[1].content
        server.plane.metrics.errors.clear()
    return len(calls)


async def test_an_answer_that_streams_is_kept_whole() -> None:
    async def handler(_plane: Plane, _call: Call) -> Response:
        async def parts() -> "object":
            for part in (b'{"a"', b":", b"1}"):
                yield part

        return StreamingResponse(parts(), 201, {"x-fuse-offset": "1"}, "application/json")

    async with running() as server, _client(server, handler) as http:
        headers = {"Idempotency-Key": "k"}
        first = await http.post("/v1/environments/fuse-t1/processes", headers=headers)
        again = await http.post("/v1/environments/fuse-t1/processes", headers=headers)
        assert (first.json(), again.json()) == ({"a": 1}, {"a": 1})
        assert first.headers["x-fuse-offset"] == "1"
        assert first.headers["content-length"] == "7"
        assert again.headers["idempotency-replayed"] == "true"


async def test_a_process_is_started_once_under_a_key() -> None:
    """Its answer is relayed from the machine, as it comes."""
    async with running() as server:
        await server.create()
        relays = server.host.count("relay")
        url, headers = "/v1/environments/fuse-t1/processes", {"Idempotency-Key": "k"}
        first = await server.http.post(url, json={"cmd": ["true"]}, headers=headers)
        again = await server.http.post(url, json={"cmd": ["true"]}, headers=headers)
        assert (first.status_code, first.content) == (again.status_code, again.content)
        assert first.status_code < 300
        assert server.host.count("relay") == relays + 1


async def test_an_answer_that_is_too_long_is_given_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "MAX_KEPT", 10)

    async def handler(_plane: Plane, _call: Call) -> Response:
        return reply("x" * 100)

    async with running() as server, _client(server, handler) as http:
        headers = {"Idempotency-Key": "k"}
        assert (await http.post("/v1/environments", headers=headers)).json() == "x" * 100
        again = await http.post("/v1/environments", headers=headers)
        assert (again.status_code, _reason(again)) == (409, "idempotency_in_progress")


async def test_keys_of_different_callers_do_not_meet() -> None:
    async with running(auth_token=TOKEN) as server:
        callers = {"master": MASTER}
        for name, body in (
            ("a", {"tenant": "a"}),
            ("a2", {"tenant": "a"}),
            ("b", {"tenant": "b"}),
            ("c", {}),
            ("d", {}),
        ):
            made = (await server.http.post("/v1/api-keys", json=body, headers=MASTER)).json()
            callers[name] = {"Authorization": f"Bearer {made['key']}"}
        replayed = {}
        for number, (name, headers) in enumerate(callers.items()):
            body = {"task_id": "shared" if name in ("a", "a2") else f"t{number}"}
            answer = await server.http.post("/v1/environments", json=body, headers=headers | {"Idempotency-Key": "k"})
            assert answer.status_code == 201, answer.text
            replayed[name] = "idempotency-replayed" in answer.headers
        assert replayed == {"master": False, "a": False, "a2": True, "b": False, "c": False, "d": False}


async def test_the_text_of_an_api_key_is_answered_again_and_never_stored_in_the_clear() -> None:
    async with running(auth_token=TOKEN) as server:
        headers = MASTER | {"Idempotency-Key": "k"}
        first = await server.http.post("/v1/api-keys", json={}, headers=headers)
        again = await server.http.post("/v1/api-keys", json={}, headers=headers)
        assert first.json() == again.json()
        assert len(await server.plane.store.keys()) == 1
        seen = idempotency.RequestKey("", "create_api_key", "k", "", "reader")
        stored = await server.plane.store.claim_request(seen, 60_000)
        assert stored is not None
        assert stored.status == 201
        assert first.json()["key"] not in stored.body
        assert "fuse_sk" not in stored.body


SECRET = "what the command printed"


async def _said(_plane: Plane, _call: Call) -> Response:
    return reply({"stdout": SECRET})


async def _kept(server: Running) -> idempotency.StoredRequest:
    seen = idempotency.RequestKey("", "exec_command", "k", "", "reader")
    stored = await server.plane.store.claim_request(seen, 60_000)
    assert stored is not None
    return stored


async def test_every_answer_is_kept_sealed_where_there_is_a_key() -> None:
    url, headers = "/v1/environments/fuse-t1?action=exec", {"Idempotency-Key": "k"}
    async with running() as server, _client(server, _said) as http:
        assert (await http.post(url, headers=headers)).json() == {"stdout": SECRET}
        stored = await _kept(server)
        assert (stored.status, stored.is_sealed, SECRET in stored.body) == (200, True, False)
        again = await http.post(url, headers=headers)
        assert (again.json(), again.headers["idempotency-replayed"]) == ({"stdout": SECRET}, "true")
    async with running() as server, _client(server, _said) as http, _client(server, _said, Sealer(bytes(32))) as other:
        await http.post(url, headers=headers)
        dropped = await other.post(url, headers=headers)
        assert (dropped.status_code, _reason(dropped)) == (409, "idempotency_in_progress")


async def test_without_a_key_to_seal_with_an_answer_is_kept_as_it_is() -> None:
    url, headers = "/v1/environments/fuse-t1?action=exec", {"Idempotency-Key": "k"}
    async with running() as server, _client(server, _said, Sealer(None)) as http:
        answers = [await http.post(url, headers=headers) for _ in range(2)]
        assert [answer.json() for answer in answers] == [{"stdout": SECRET}] * 2
        assert not (await _kept(server)).is_sealed


async def test_what_fails_after_its_first_change_is_answered_the_same_again() -> None:
    async def handler(_plane: Plane, call: Call) -> Response:
        call.acted_on = "u1"
        raise SnapshotFailed(id="s1", problem="no room")

    async with running(checked=False) as server, _client(server, handler) as http:
        answers = [await http.post("/v1/hosts/h1?action=cordon", headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert ["idempotency-replayed" in answer.headers for answer in answers] == [False, True]
        server.plane.metrics.errors.clear()


async def test_a_snapshot_is_taken_once_under_a_key() -> None:
    async with running() as server:
        await server.create()
        headers = {"Idempotency-Key": "k"}
        first = await server.http.post("/v1/environments/fuse-t1/snapshots", json={}, headers=headers)
        again = await server.http.post("/v1/environments/fuse-t1/snapshots", json={}, headers=headers)
        assert first.status_code == 201
        assert first.json() == again.json()
        listed = (await server.http.get("/v1/snapshots")).json()["snapshots"]
        assert len(listed) == 1


async def test_a_repetition_of_a_create_that_is_under_way_waits_for_what_it_made() -> None:
    async with running() as server:
        server.host.hold["create"] = asyncio.Event()
        headers = {"Idempotency-Key": "k"}
        first = asyncio.ensure_future(server.http.post("/v1/environments", json={"task_id": "t"}, headers=headers))
        await until(lambda: server.host.count("create") == 1)
        again = asyncio.ensure_future(server.http.post("/v1/environments", json={"task_id": "t"}, headers=headers))
        await until(lambda: server.plane.metrics.in_flight._value.get() == 2)
        server.host.hold["create"].set()
        one, other = await first, await again
        assert (one.status_code, other.status_code) == (201, 201)
        assert one.json()["uid"] == other.json()["uid"]
        assert server.host.count("create") == 1


async def test_reading_ignores_a_key() -> None:
    async with running() as server:
        for _ in range(2):
            answer = await server.http.get("/v1/environments", headers={"Idempotency-Key": "k"})
            assert (answer.status_code, "idempotency-replayed" in answer.headers) == (200, False)
