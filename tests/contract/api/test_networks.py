"""Which addresses are served, and which pages may read."""

import httpx
import pytest
import websockets
from control_harness import running

CONSOLE = "https://console.example"
TOKEN = "master-token"
MASTER = {"Authorization": f"Bearer {TOKEN}"}
LOCAL = ("127.0.0.0/8",)


@pytest.mark.parametrize("networks", [("10.0.0.0/8",), ("2001:db8::/32", "192.0.2.7/32")])
async def test_an_address_outside_of_the_networks_is_refused_everywhere_but_where_monitors_ask(
    networks: tuple[str, ...],
) -> None:
    async with running(allowed_cidrs=networks, auth_token=TOKEN, headers=MASTER) as server:
        for path in ("/v1/environments", "/v1/hosts", "/login", "/openapi.json", "/nowhere", "/v1/api-keys"):
            answer = await server.http.get(path)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["details"]["reason"]) == (403, "forbidden", "forbidden")
            assert "127.0.0.1" in error["message"]
        for path in ("/health", "/ready", "/metrics", "/v1/version"):
            assert (await server.http.get(path)).status_code == 200
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t/shell"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url, additional_headers=MASTER)
        assert caught.value.response.status_code == 403


@pytest.mark.parametrize("networks", [("127.0.0.1/32",), ("10.0.0.0/8", "127.0.0.0/8")])
async def test_an_address_within_one_of_the_networks_is_served(networks: tuple[str, ...]) -> None:
    async with running(allowed_cidrs=networks) as server:
        await server.create()


async def test_ipv6_and_mapped_addresses_are_told_apart() -> None:
    for networks, status in ((("::1/128",), 200), (("127.0.0.0/8",), 403)):
        async with running(allowed_cidrs=networks, listen="[::1]:0") as server:
            assert (await server.http.get("/v1/environments")).status_code == status
    async with running(allowed_cidrs=("127.0.0.0/8",), listen=":0", auth_token=TOKEN, headers=MASTER) as server:
        # One socket for both families: the peer is ::ffff:127.0.0.1.
        assert (await server.http.get("/v1/environments")).status_code == 200


async def _status(http: httpx.AsyncClient, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return (await http.get("/v1/environments", headers=named)).status_code


async def test_nobody_is_believed_who_is_no_proxy_of_ours() -> None:
    async with running(allowed_cidrs=("10.0.0.0/8",)) as server:
        assert await _status(server.http, X_Forwarded_For="10.0.0.1") == 403
        assert await _status(server.http, Forwarded="for=10.0.0.1") == 403
    async with running(allowed_cidrs=LOCAL) as server:
        assert await _status(server.http, X_Forwarded_For="203.0.113.9") == 200


async def test_behind_a_proxy_its_client_counts_and_what_that_invents_does_not() -> None:
    async with running(allowed_cidrs=("10.0.0.0/8",), trusted_proxies=LOCAL) as server:
        assert await _status(server.http, X_Forwarded_For="10.0.0.1") == 200
        assert await _status(server.http, Forwarded='for="10.0.0.1:4711";proto=https') == 200
        assert await _status(server.http, X_Forwarded_For="203.0.113.9") == 403
        assert await _status(server.http, X_Forwarded_For="10.0.0.1, 203.0.113.9") == 403
        assert await _status(server.http, X_Forwarded_For="203.0.113.9, 10.0.0.1") == 200
        assert await _status(server.http, X_Forwarded_For="nonsense") == 403
        assert await _status(server.http) == 403
        assert await _status(server.http, Forwarded="for=10.0.0.1", X_Forwarded_For="203.0.113.9") == 400


# -- pages ---------------------------------------------------------------------------------------------------------


async def _preflight(http: httpx.AsyncClient, origin: str, path: str = "/v1/environments") -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return await http.options(path, headers=headers)


async def test_a_preflight_is_answered_before_a_token_is_asked_for() -> None:
    async with running(auth_token=TOKEN, cors_origins=(CONSOLE,)) as server:
        answer = await _preflight(server.http, CONSOLE)
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == CONSOLE
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert answer.headers["access-control-allow-methods"] == "GET, HEAD, OPTIONS, POST"
        for name in ("Authorization", "Idempotency-Key", "If-Match", "Last-Event-ID"):
            assert name in answer.headers["access-control-allow-headers"]


async def test_a_listed_page_may_read_every_answer_errors_too() -> None:
    async with running(auth_token=TOKEN, cors_origins=(CONSOLE,)) as server:
        for headers, status in ((MASTER, 200), ({}, 401)):
            answer = await server.http.get("/v1/environments", headers=headers | {"Origin": CONSOLE})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == CONSOLE
            assert answer.headers["vary"] == "Origin"
            assert "ETag" in answer.headers["access-control-expose-headers"]


async def test_a_page_that_is_not_listed_may_read_nothing() -> None:
    async with running(auth_token=TOKEN, cors_origins=(CONSOLE,)) as server:
        for origin in ("https://evil.example", CONSOLE + ".evil.example", "http://console.example", "null"):
            for answer in (
                await _preflight(server.http, origin),
                await server.http.get("/v1/environments", headers=MASTER | {"Origin": origin}),
            ):
                assert not [name for name in answer.headers if name.startswith("access-control-")]
                assert answer.headers["vary"] == "Origin"


async def test_every_page_may_read_if_told_so_but_never_with_a_session() -> None:
    async with running(auth_token=TOKEN, cors_origins=("*",)) as server:
        answer = await _preflight(server.http, "https://any.example")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


async def test_without_the_setting_no_page_is_spoken_of() -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await _preflight(server.http, CONSOLE)
        assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert "vary" not in answer.headers


async def test_options_tell_what_a_path_takes() -> None:
    async with running() as server:
        answer = await server.http.options("/v1/environments/fuse-t")
        assert (answer.status_code, answer.headers["allow"]) == (204, "DELETE, GET, HEAD, OPTIONS, POST")
        missing = await server.http.options("/nowhere")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "route_not_found")


async def test_without_a_token_a_listed_page_may_act_and_no_other() -> None:
    async with running(cors_origins=(CONSOLE,)) as server:
        body = {"task_id": "t"}
        ours = await server.http.post("/v1/environments", json=body, headers={"Origin": CONSOLE})
        assert ours.status_code == 201
        evil = await server.http.post("/v1/environments", json=body, headers={"Origin": "https://evil.example"})
        assert evil.status_code == 403
