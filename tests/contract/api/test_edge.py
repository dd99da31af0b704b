"""What holds for every request: ids, envelopes, methods, limits, who may come in."""

import asyncio
import base64
import re

import msgspec
import pytest
import websockets
from control_harness import running, until

import fusevm
from fusevm.control.app import http_handlers, socket_handlers
from fusevm.control.cors import Cors
from fusevm.control.gate import Gate
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.statements import Statement
from fusevm.testing.fake_host import FakeHost
from fusevm.wire.errors import Envelope, parse_error
from fusevm.wire.routes import ROUTES, Payload, Route, Scope

TOKEN = "s3cret-token"
_FRESH = re.compile(r"req_[0-9a-f]{32}")


def _filled(path: str) -> str:
    return path.replace("{id}", "fuse-t1").replace("{pid}", "1").replace("{port}", "80")


async def test_every_answer_has_a_request_id_and_a_server() -> None:
    async with running() as server:
        for answer in (
            await server.http.get("/health"),
            await server.http.get("/nowhere"),
            await server.http.put("/v1/environments"),
            await server.http.post("/v1/environments", content=b"{"),
        ):
            assert _FRESH.fullmatch(answer.headers["x-request-id"])
            assert answer.headers["server"] == f"fuse-orchestrator/{fusevm.__version__}"


@pytest.mark.parametrize(("sent", "is_kept"), [("abc-_1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)])
async def test_a_request_id_is_kept_when_it_fits(sent: str, is_kept: bool) -> None:
    async with running() as server:
        answer = await server.http.get("/health", headers={"X-Request-ID": sent})
        assert (answer.headers["x-request-id"] == sent) is is_kept


async def test_the_request_id_is_the_cause_of_what_follows() -> None:
    async with running() as server:
        headers = {"X-Request-ID": "mine"}
        made = (await server.http.post("/v1/environments", json={"task_id": "t"}, headers=headers)).json()
        facts = await server.plane.store.facts_of(made["uid"], 0, 10)
        assert facts[0].fact.cause == "request mine"


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/environments/", "/v1/environments/a/b", "/v1//environments", "/v1/%FF"]
)
async def test_an_unknown_path_is_an_enveloped_404(path: str) -> None:
    async with running() as server:
        answer = await server.http.get(path)
        error = msgspec.json.decode(answer.content, type=Envelope).error
        assert (answer.status_code, error.code) == (404, "route_not_found")
        assert "GET" in error.message


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/environments", "GET, HEAD, OPTIONS, POST"),
        ("/v1/environments/fuse-t", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("/v1/environments/fuse-t/files", "DELETE, GET, HEAD, OPTIONS, POST, PUT"),
        ("/v1/environments/fuse-t/shell", "GET, OPTIONS"),
        ("/v1/hosts/h1", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("/health", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_wrong_method_is_an_enveloped_405_with_every_method(path: str, allowed: str) -> None:
    async with running() as server:
        answer = await server.http.request("PATCH", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["details"]["reason"] == "method_not_allowed"


async def test_segments_are_decoded_one_by_one() -> None:
    async with running() as server:
        await server.create("A_b.1")
        assert (await server.http.get("/v1/environments/fuse%2DA%5Fb%2E1")).status_code == 200
        slashed = await server.http.get("/v1/environments/fuse-a%2Fb")
        assert slashed.json()["error"]["details"] == {"reason": "environment_not_found", "id": "fuse-a/b"}


async def test_head_answers_as_get_without_a_body() -> None:
    async with running() as server:
        answer, full = await server.http.head("/v1/version"), await server.http.get("/v1/version")
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == str(len(full.content))


@pytest.mark.parametrize(
    ("path", "size"), [("/v1/environments", 4 << 20), ("/v1/environments/fuse-t?action=exec", 1 << 20)]
)
async def test_a_body_over_its_limit_is_refused(path: str, size: int) -> None:
    async with running() as server:
        answer = await server.http.post(path, content=b" " * (size + 1))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")

        async def chunks() -> "object":
            for _ in range(size // 65536 + 1):
                yield b" " * 65536

        assert (await server.http.post(path, content=chunks())).status_code == 413


async def test_small_routes_take_small_bodies() -> None:
    async with running() as server:
        await server.create()
        url = "/v1/environments/fuse-t1/files?op=stat"
        assert (await server.http.post(url, content=b" " * (64 << 10) + b" ")).status_code == 413


async def test_every_row_has_a_handler_or_says_why_not() -> None:
    built = {route.name for route in ROUTES if not route.unimplemented}
    async with running() as server:
        handlers = http_handlers(Gate(server.plane, Cors(())))
    assert built == set(handlers) | set(socket_handlers())
    assert len({route.name for route in ROUTES}) == len(ROUTES)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.unimplemented], ids=lambda route: route.name)
async def test_what_is_not_built_says_so(route: object) -> None:
    assert isinstance(route, Route)
    async with running() as server:
        params = {route.selector: route.value} if route.selector else {}
        answer = await server.http.request(route.method, _filled(route.path), params=params)
        assert (answer.status_code, answer.json()["error"]["code"]) == (501, "unimplemented")
        assert route.unimplemented in answer.json()["error"]["message"]


async def test_an_unknown_action_names_the_known_ones() -> None:
    async with running() as server:
        for url in ("/v1/environments/fuse-t?action=fly", "/v1/environments/fuse-t"):
            answer = await server.http.post(url)
            assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (400, "unknown_action")
            assert "exec" in answer.json()["error"]["message"]


async def test_the_service_routes() -> None:
    async with running() as server:
        assert (await server.http.get("/health")).json() == {"status": "ok"}
        ready = await server.http.get("/ready")
        assert (ready.status_code, ready.json()["checks"]) == (200, {"state_store": "ok", "fleet": "1 of 1 answer"})
        assert (await server.http.get("/v1/version")).json()["service"] == "fuse-orchestrator"
        document = (await server.http.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        assert "/v1/environments/{id}/files" in document["paths"]
        await server.create()
        metrics = (await server.http.get("/metrics")).text
        for line in (
            'orchestrator_fleet_tracked_vms{state="running"} 1.0',
            'orchestrator_http_requests_total{code="201",method="POST",route="create_environment"} 1.0',
            'orchestrator_operations_total{op="boot",result="ok"} 1.0',
            'orchestrator_host_up{host="h1"} 1.0',
        ):
            assert line in metrics


async def test_a_server_that_closes_is_not_ready() -> None:
    async with running() as server:
        server.plane.closing.set()
        assert (await server.http.get("/ready")).status_code == 503


async def test_a_broken_store_is_a_clean_error() -> None:
    async with running(checked=False) as server:
        assert isinstance(server.plane.store, SqlStore)
        await server.plane.store.close()
        answer = await server.http.get("/v1/environments")
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "1"
        assert (await server.http.get("/ready")).status_code == 503
        assert (await server.http.get("/health")).status_code == 200


async def test_a_bug_is_a_500_without_its_insides() -> None:
    async with running(checked=False) as server:
        assert isinstance(server.plane.store, SqlStore)
        await server.plane.store._engine.apply(Statement("", (), "drop table hosts"))
        answer = await server.http.get("/v1/hosts")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert "hosts" not in answer.json()["error"]["message"]


# -- who may come in -----------------------------------------------------------------------------------------------


async def test_a_token_is_asked_for_where_it_matters() -> None:
    async with running(auth_token=TOKEN) as server:
        for route in ROUTES:
            if route.gives is Payload.FRAMES:
                continue
            params = {route.selector: route.value} if route.selector else {}
            answer = await server.http.request(route.method, _filled(route.path), params=params)
            is_refused = answer.status_code == 401
            assert is_refused is (route.scope is not Scope.OPEN), route.name
            if is_refused and route.method != "HEAD":
                assert answer.json()["error"]["code"] == "unauthorized"
                assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer x", f"bearer {TOKEN}", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"]
)
async def test_a_wrong_token_is_refused(header: str) -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await server.http.get("/v1/environments", headers={"Authorization": header})
        assert answer.status_code == 401
        assert TOKEN not in answer.text


async def test_the_right_token_opens() -> None:
    async with running(auth_token=TOKEN, headers={"Authorization": f"Bearer {TOKEN}"}) as server:
        await server.create()
        assert (await server.http.get("/v1/environments", headers={"Host": "fuse.example"})).status_code == 200
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t1/shell"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url)
        assert caught.value.response.status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with websockets.connect(url, additional_headers=headers) as socket:
            await socket.recv()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "[::2]:1", ""])
async def test_without_a_token_only_local_names_are_answered(host: str) -> None:
    async with running() as server:
        answer = await server.http.get("/health", headers={"Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "fuse.lan"])
async def test_local_names_and_chosen_ones_are_answered(host: str) -> None:
    async with running(allowed_hosts=("fuse.lan",)) as server:
        assert (await server.http.get("/health", headers={"Host": host})).status_code == 200


async def test_without_a_token_pages_of_others_are_refused() -> None:
    async with running() as server:
        await server.create()
        for odd in ("http://[", "null", "http://localhost@evil.example", "x"):
            assert (await server.http.get("/v1/environments", headers={"Origin": odd})).status_code == 403
        evil = {"Origin": "https://evil.example"}
        answer = await server.http.post("/v1/environments", json={"task_id": "t2"}, headers=evil)
        assert answer.status_code == 403
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t1/shell"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url, additional_headers=evil)
        assert caught.value.response.status_code == 403
        ours = {"Origin": "http://localhost:4000"}
        assert (await server.http.get("/v1/environments", headers=ours)).status_code == 200


async def test_errors_round_trip_to_their_class() -> None:
    async with running() as server:
        answer = await server.http.get("/v1/hosts/nowhere")
        error = parse_error(answer.status_code, answer.content)
        assert (type(error).__name__, error.details["id"]) == ("HostNotFound", "nowhere")


async def test_many_requests_on_one_connection_do_not_mix() -> None:
    async with running() as server:
        await asyncio.gather(*(server.http.get("/health") for _ in range(50)))
        await until(lambda: server.plane.metrics.in_flight._value.get() == 0)


async def test_hosts_are_listed_in_pages() -> None:
    async with running(FakeHost("a"), FakeHost("b"), FakeHost("c")) as server:
        page = (await server.http.get("/v1/hosts?limit=2")).json()
        assert [host["id"] for host in page["hosts"]] == ["a", "b"]
        rest = (await server.http.get("/v1/hosts", params={"cursor": page["next_cursor"]})).json()
        assert [host["id"] for host in rest["hosts"]] == ["c"]
        assert rest["hosts"][0]["health"] == "ok"
        assert rest["hosts"][0]["state"] == "active"
        assert rest["hosts"][0]["last_seen"]
        missing = await server.http.get("/v1/hosts/nowhere")
        assert (missing.status_code, missing.json()["error"]["details"]["reason"]) == (404, "host_not_found")


DEEP = base64.urlsafe_b64encode(b"[" * 40_000).decode()


@pytest.mark.parametrize("path", ["/v1/environments", "/v1/snapshots", "/v1/hosts"])
async def test_no_cursor_and_no_page_size_breaks_a_list(path: str) -> None:
    async with running() as server:
        for cursor in (
            DEEP,
            "x" * 5_000,
            _cursor(b'{"after":' + b"[" * 40_000),
            _cursor(b'{"other":' + b"[" * 40_000),
            _cursor(b'{"before":"x","after":"y"}'),
            _cursor(b'{"after":"\\ud800"}'),
            _cursor(b'{"after":1}'),
            "\u0661",
        ):
            answer = await server.http.get(path, params={"cursor": cursor})
            assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "cursor"), cursor[:60]
        for limit in ("9" * 5_000, "\u0661" * 5_000, "-1", "many", "0"):
            assert (await server.http.get(path, params={"limit": limit})).status_code == 200
        cursor = _cursor(b'{"after":"zzz\\u0000"}')
        assert (await server.http.get(path, params={"cursor": cursor})).status_code == 200


def _cursor(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


async def test_no_number_breaks_a_query() -> None:
    async with running() as server:
        url = server.url.replace("http", "ws", 1) + f"/v1/environments/fuse-t1/shell?rows={'9' * 5_000}"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url)
        assert caught.value.response.status_code == 400
