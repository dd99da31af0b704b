"""Login, the session cookie, pages of other origins, and too many wrong tokens."""

import re
from collections.abc import Mapping

import httpx
import pytest
import websockets
from control_harness import Running, running

from fusevm.control import attempts
from fusevm.control.attempts import BURST
from fusevm.control.session import COOKIE

TOKEN = "master-token"
MASTER = {"Authorization": f"Bearer {TOKEN}"}
KEY = "ab" * 32


async def _login(server: Running, token: str = TOKEN, **headers: str) -> httpx.Response:
    return await server.http.post("/login", json={"token": token}, headers=headers)


async def _cookie(server: Running, token: str = TOKEN) -> dict[str, str]:
    """The header of a browser that has logged in."""
    answer = await _login(server, token)
    assert (answer.status_code, answer.content) == (204, b"")
    server.http.cookies.clear()
    found = re.match(rf"({COOKIE}=[^;]+);", answer.headers["set-cookie"])
    assert found is not None
    return {"Cookie": found.group(1)}


def _reason(answer: httpx.Response) -> str:
    return answer.json()["error"]["details"]["reason"]


def _own(server: Running) -> dict[str, str]:
    return {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}


async def test_a_login_begins_a_session_whose_cookie_is_not_the_token() -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await _login(server)
        assert answer.status_code == 204
        cookie = answer.headers["set-cookie"]
        assert TOKEN not in cookie
        assert cookie.endswith("; Path=/; Max-Age=604800; HttpOnly; SameSite=Lax")
        assert (await server.http.get("/v1/environments")).status_code == 200
        server.http.cookies.clear()
        assert (await server.http.get("/v1/environments")).status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"token": "wrong"}', 401),
        (b'{"token": ""}', 400),
        (b"{}", 400),
        (b"", 400),
        (b"{", 400),
        (b'{"token": "' + b"x" * 4096 + b'"}', 413),
        (b'{"token": "fuse_sk_abc_def"}', 401),
    ],
)
async def test_a_login_that_fails(body: bytes, status: int) -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await server.http.post("/login", content=body)
        assert answer.status_code == status
        assert "set-cookie" not in answer.headers
        assert answer.json()["error"]["message"]


async def test_a_logout_deletes_the_cookie() -> None:
    async with running(auth_token=TOKEN) as server:
        await _login(server)
        answer = await server.http.post("/logout")
        assert (answer.status_code, answer.content) == (204, b"")
        assert "Max-Age=0" in answer.headers["set-cookie"]
        assert (await server.http.get("/v1/environments")).status_code == 401


async def test_without_a_master_token_a_login_is_without_effect() -> None:
    async with running() as server:
        answer = await _login(server, "any")
        assert answer.status_code == 204
        assert "set-cookie" not in answer.headers


async def test_a_session_has_the_rights_of_its_key_and_ends_with_it() -> None:
    async with running(auth_token=TOKEN) as server:
        body = {"scopes": ["environments:read"], "tenant": "acme"}
        made = (await server.http.post("/v1/api-keys", json=body, headers=MASTER)).json()
        cookie = await _cookie(server, made["key"])
        assert made["key"] not in cookie["Cookie"]
        assert (await server.http.get("/v1/environments", headers=cookie)).status_code == 200
        create = await server.http.post("/v1/environments", json={"task_id": "t"}, headers=cookie | _own(server))
        assert (create.status_code, _reason(create)) == (403, "scope_missing")
        await server.http.delete(f"/v1/api-keys/{made['id']}", headers=MASTER)
        over = await server.http.get("/v1/environments", headers=cookie)
        assert (over.status_code, "log in again" in over.text) == (401, True)


async def test_a_session_survives_a_restart_but_not_a_new_master_token(tmp_path) -> None:  # type: ignore[no-untyped-def]
    database = str(tmp_path / "fuse.db")
    async with running(auth_token=TOKEN, database=database, encryption_key=KEY) as server:
        cookie = await _cookie(server)
    async with running(auth_token=TOKEN, database=database, encryption_key=KEY) as server:
        assert (await server.http.get("/v1/environments", headers=cookie)).status_code == 200
    async with running(auth_token="another", database=database, encryption_key=KEY) as server:
        assert (await server.http.get("/v1/environments", headers=cookie)).status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", f"bearer {TOKEN}", "Basic eDp5", "nonsense"])
async def test_beside_a_malformed_header_the_cookie_is_not_looked_at(header: str) -> None:
    async with running(auth_token=TOKEN) as server:
        cookie = await _cookie(server)
        answer = await server.http.get("/v1/environments", headers=cookie | {"Authorization": header})
        assert answer.status_code == 401


@pytest.mark.parametrize("value", ["x", TOKEN, "", "A" * 200])
async def test_a_cookie_that_was_made_up_opens_nothing(value: str) -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await server.http.get("/v1/environments", headers={"Cookie": f"{COOKIE}={value}"})
        assert answer.status_code == 401


# -- pages of others -----------------------------------------------------------------------------------------------

FOREIGN = [
    {},
    {"Origin": "https://evil.example"},
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "null"},
    {"Origin": "http://["},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize("page", FOREIGN, ids=str)
async def test_with_a_session_another_page_changes_nothing(page: dict[str, str]) -> None:
    async with running(auth_token=TOKEN) as server:
        cookie = await _cookie(server)
        for method, path in (
            ("POST", "/v1/environments"),
            ("DELETE", "/v1/environments/fuse-t"),
            ("POST", "/v1/api-keys"),
        ):
            answer = await server.http.request(method, path, headers=cookie | page)
            assert (answer.status_code, _reason(answer)) == (403, "forbidden")
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t/shell"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url, additional_headers=cookie | page)
        assert caught.value.response.status_code == 403
        assert (await server.http.get("/v1/environments", headers=cookie | page)).status_code == 200
        assert (
            await server.http.post("/v1/environments", json={"task_id": "t"}, headers=MASTER | page)
        ).status_code == 201


async def test_our_own_pages_and_listed_ones_may_act_with_a_session() -> None:
    console = "https://console.example"
    async with running(auth_token=TOKEN, cors_origins=(console,)) as server:
        cookie = await _cookie(server)
        pages = [_own(server), {"Origin": server.url}, {"Sec-Fetch-Site": "same-origin"}, {"Origin": console}]
        for number, page in enumerate(pages):
            body = {"task_id": f"t{number}"}
            answer = await server.http.post("/v1/environments", json=body, headers=cookie | page)
            assert answer.status_code == 201, page
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t0/shell"
        async with websockets.connect(url, additional_headers=cookie | {"Origin": server.url}) as socket:
            await socket.recv()


@pytest.mark.parametrize("path", ["/login", "/logout"])
@pytest.mark.parametrize("page", FOREIGN[1:7], ids=str)
async def test_another_page_neither_logs_in_nor_out(path: str, page: Mapping[str, str]) -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await server.http.post(path, json={"token": TOKEN}, headers=page)
        assert (answer.status_code, _reason(answer)) == (403, "forbidden")


# -- too many wrong tokens -----------------------------------------------------------------------------------------


async def test_too_many_wrong_tokens_are_a_429_that_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "REFILL_S", 600.0)
    async with running(auth_token=TOKEN) as server:
        wrong = {"Authorization": "Bearer wrong"}
        statuses = [(await _login(server, "wrong")).status_code for _ in range(BURST // 2)]
        statuses += [(await server.http.get("/v1/environments", headers=wrong)).status_code for _ in range(BURST // 2)]
        assert statuses == [401] * BURST
        for answer in (await _login(server), await server.http.get("/v1/environments", headers=wrong)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
            assert 500 < int(answer.headers["retry-after"]) <= 600
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t/shell"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url, additional_headers=wrong)
        assert caught.value.response.status_code == 429
        assert (await server.http.get("/health")).status_code == 200
        assert (await server.http.get("/v1/environments")).status_code == 401
        metrics = (await server.http.get("/metrics")).text
        assert f'orchestrator_requests_refused_total{{kind="token"}} {float(BURST)}' in metrics
        assert 'orchestrator_requests_refused_total{kind="rate_limited"} 3.0' in metrics


async def test_a_program_with_an_old_token_does_not_lock_out_its_neighbours() -> None:
    async with running(auth_token=TOKEN) as server:
        cookie = await _cookie(server)
        for _ in range(BURST + 1):
            await server.http.get("/v1/environments", headers={"Authorization": "Bearer wrong"})
        assert (await server.http.get("/v1/environments", headers=MASTER)).status_code == 200
        assert (await server.http.get("/v1/environments", headers=cookie)).status_code == 200


async def test_failures_write_nothing() -> None:
    async with running(auth_token=TOKEN) as server:
        before = await server.plane.store.last_position()
        for _ in range(BURST + 5):
            await _login(server, "fuse_sk_0123456789abcdef_wrong")
        assert await server.plane.store.last_position() == before
        assert await server.plane.store.keys() == []


@pytest.mark.parametrize("secure", [True, None])
async def test_the_cookie_is_for_https_where_that_is_served_or_said(secure: bool | None) -> None:
    async with running(auth_token=TOKEN, secure_cookies=secure) as server:
        cookie = (await _login(server)).headers["set-cookie"]
        assert cookie.endswith("; Secure") is bool(secure)


async def test_metrics_ask_for_a_token_if_told_to() -> None:
    async with running(auth_token=TOKEN, metrics_auth=True) as server:
        assert (await server.http.get("/metrics")).status_code == 401
        assert (await server.http.get("/metrics", headers=MASTER)).status_code == 200
        made = (await server.http.post("/v1/api-keys", headers=MASTER)).json()
        headers = {"Authorization": f"Bearer {made['key']}"}
        assert (await server.http.get("/metrics", headers=headers)).status_code == 403
