"""API keys: made, used, limited, expired, revoked; and tenants that do not see each other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest
import websockets
from control_harness import TIMEOUT_S, Running, next_message, running, stream, until, waking

from fusevm.control.caller import Caller
from fusevm.control.clock import SystemClock
from fusevm.control.handlers.keys import MAX_LABEL, MAX_LIFE_S
from fusevm.control.handlers.sockets import POLICY_VIOLATION
from fusevm.control.host_api import GuestRequest
from fusevm.control.session import LIFE_S
from fusevm.control.standing import check_standing
from fusevm.control.store.protocol import Store
from fusevm.model.errors import StoreUnreachable, Unauthorized
from fusevm.testing.fake_host import FakeAnswer, FakeHost
from fusevm.wire.frames import FrameType, decode_message
from fusevm.wire.routes import ROUTES, Route, Scope

TOKEN = "master-token"
MASTER = {"Authorization": f"Bearer {TOKEN}"}


class ShiftedClock(SystemClock):
    """The machine's clock, and what a test adds to it."""

    shift_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.shift_ms


async def _shift(server: Running, clock: ShiftedClock, by_ms: int) -> None:
    """Until the server knows what time it is in its database."""
    clock.shift_ms = by_ms
    await until(lambda: server.plane.clock.now_ms() >= clock.now_ms() - 1000)


async def _key(server: Running, **body: Any) -> dict[str, Any]:
    answer = await server.http.post("/v1/api-keys", json=body, headers=MASTER)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def _as(server: Running, **body: Any) -> dict[str, str]:
    """Headers of a fresh key."""
    return {"Authorization": f"Bearer {(await _key(server, **body))['key']}"}


def _reason(answer: httpx.Response) -> str:
    return answer.json()["error"]["details"]["reason"]


async def test_a_key_is_shown_once_and_listed_without_its_text() -> None:
    async with running(auth_token=TOKEN) as server:
        made = await _key(server, label="ci", tenant="acme", expires_in_seconds=3600)
        text = made.pop("key")
        assert text.startswith("fuse_sk_")
        assert made["id"].startswith("ak_")
        assert len(made["id"]) == len("ak_") + 16
        (listed,) = (await server.http.get("/v1/api-keys", headers=MASTER)).json()["api_keys"]
        assert listed == made
        assert (made["label"], made["tenant"]) == ("ci", "acme")
        assert made["expires_at"] > made["created_at"]
        stored = await server.plane.store.keys()
        assert text not in str(stored)
        assert text.rpartition("_")[2] not in str(stored)


async def test_a_key_without_a_body_has_the_rights_of_the_contracts_keys() -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await server.http.post("/v1/api-keys", headers=MASTER)
        assert answer.status_code == 201
        assert answer.json()["label"] == ""
        assert answer.json()["scopes"] == [scope.value for scope in Scope if scope not in (Scope.OPEN, Scope.ADMIN)]
        tenants = await _key(server, tenant="acme")
        assert set(tenants["scopes"]) == set(answer.json()["scopes"]) - {"hosts"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scopes": ["everything"]}, "scopes"),
        ({"scopes": [""]}, "scopes"),
        ({"scopes": ["admin"], "tenant": "acme"}, "scopes"),
        ({"scopes": ["hosts"], "tenant": "acme"}, "scopes"),
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": "x" * 64}, "tenant"),
        ({"label": "x" * (MAX_LABEL + 1)}, "label"),
        ({"label": "a\nb"}, "label"),
        ({"expires_in_seconds": -1}, "expires_in_seconds"),
        ({"expires_in_seconds": MAX_LIFE_S + 1}, "expires_in_seconds"),
    ],
)
async def test_a_key_that_makes_no_sense_is_refused_by_field(body: Mapping[str, Any], field: str) -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await server.http.post("/v1/api-keys", json=body, headers=MASTER)
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, field)
        assert await server.plane.store.keys() == []


async def test_a_revoked_key_is_refused_at_the_next_request() -> None:
    async with running(auth_token=TOKEN) as server:
        made = await _key(server)
        headers = {"Authorization": f"Bearer {made['key']}"}
        assert (await server.http.get("/v1/environments", headers=headers)).status_code == 200
        revoked = await server.http.delete(f"/v1/api-keys/{made['id']}", headers=MASTER)
        assert (revoked.status_code, revoked.content) == (204, b"")
        assert (await server.http.get("/v1/environments", headers=headers)).status_code == 401
        assert (await server.http.delete(f"/v1/api-keys/{made['id']}", headers=MASTER)).status_code == 204
        (listed,) = (await server.http.get("/v1/api-keys", headers=MASTER)).json()["api_keys"]
        assert listed["revoked_at"]
        missing = await server.http.delete("/v1/api-keys/ak_0", headers=MASTER)
        assert (missing.status_code, _reason(missing)) == (404, "key_not_found")


async def test_an_expired_key_is_refused() -> None:
    clock = ShiftedClock()
    async with running(auth_token=TOKEN, clock=clock) as server:
        headers = await _as(server, expires_in_seconds=60)
        assert (await server.http.get("/v1/environments", headers=headers)).status_code == 200
        await _shift(server, clock, 60_000)
        assert (await server.http.get("/v1/environments", headers=headers)).status_code == 401


async def test_the_last_use_is_noted_once_a_minute() -> None:
    clock = ShiftedClock()
    async with running(auth_token=TOKEN, clock=clock) as server:
        headers = await _as(server)

        async def used() -> int | None:
            await asyncio.gather(*(server.http.get("/v1/environments", headers=headers) for _ in range(5)))
            (key,) = await server.plane.store.keys()
            return key.last_used_at_ms

        first = await used()
        assert first is not None
        await _shift(server, clock, 30_000)
        assert await used() == first
        await _shift(server, clock, 90_000)
        later = await used()
        assert later is not None
        assert later >= first + 60_000


@pytest.mark.parametrize("part", ["prefix", "secret", "end", "kind"])
async def test_a_key_must_be_right_in_every_part(part: str) -> None:
    async with running(auth_token=TOKEN) as server:
        text = (await _key(server))["key"]
        wrong = {
            "prefix": text.replace("fuse_sk_", "fuse_sk_0"),
            "secret": text[:-5] + "xxxxx",
            "end": text[:-1],
            "kind": text.replace("fuse_sk_", "fuse_pk_"),
        }[part]
        answer = await server.http.get("/v1/environments", headers={"Authorization": f"Bearer {wrong}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")


# -- rights --------------------------------------------------------------------------------------------------------


def _filled(path: str) -> str:
    return path.replace("{id}", "fuse-none").replace("{pid}", "1").replace("{port}", "80")


async def _status(server: Running, route: Route, headers: Mapping[str, str]) -> tuple[int, str]:
    params = {route.selector: route.value} if route.selector else {}
    if route.is_websocket:
        url = server.url.replace("http", "ws", 1) + _filled(route.path)
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url, additional_headers=headers)
        return caught.value.response.status_code, caught.value.response.body.decode()
    answer = await server.http.request(route.method, _filled(route.path), params=params, headers=headers)
    return answer.status_code, answer.text


@pytest.mark.parametrize("scope", [scope for scope in Scope if scope is not Scope.OPEN])
async def test_a_key_may_do_what_its_scope_says_and_nothing_else(scope: Scope) -> None:
    async with running(auth_token=TOKEN, checked=False) as server:
        headers = await _as(server, scopes=[scope.value])
        for route in ROUTES:
            if "{id}" not in route.path and route.method == "GET" and route.name == "stream_events":
                continue  # without an end; below
            status, text = await _status(server, route, headers)
            is_allowed = route.scope in (Scope.OPEN, scope) or scope is Scope.ADMIN
            is_refused = status == 403 and "scope_missing" in text
            if route.method == "HEAD":
                is_refused = status == 403
            assert is_refused is not is_allowed, f"{route.name}: {status} {text}"
            if is_refused and route.method != "HEAD":
                assert '"code":"unauthorized"' in text
                assert route.scope.value in text


async def test_the_stream_of_everything_needs_the_right_to_read() -> None:
    async with running(auth_token=TOKEN) as server:
        answer = await server.http.get("/v1/events", headers=await _as(server, scopes=["hosts"]))
        assert (answer.status_code, _reason(answer)) == (403, "scope_missing")


# -- tenants -------------------------------------------------------------------------------------------------------


async def test_tenants_do_not_see_each_others_environments() -> None:
    async with running(auth_token=TOKEN) as server:
        ours, theirs = await _as(server, tenant="ours"), await _as(server, tenant="theirs")
        body = {"task_id": "t1"}
        made = (await server.http.post("/v1/environments", json=body, headers=ours)).json()

        async def listed(headers: Mapping[str, str], **params: str) -> list[str]:
            answer = await server.http.get("/v1/environments", params=params, headers=headers)
            return [env["id"] for env in answer.json()["environments"]]

        assert await listed(ours) == await listed(MASTER) == await listed(await _as(server)) == ["fuse-t1"]
        assert await listed(theirs) == []
        assert await listed(theirs, task_id="t1") == []
        for method, path in (
            ("GET", ""),
            ("GET", f"?uid={made['uid']}"),
            ("DELETE", ""),
            ("DELETE", f"?uid={made['uid']}"),
            ("POST", "?action=drain"),
            ("POST", "?action=rotate-token"),
            ("GET", "/files?path=/etc"),
            ("GET", "/processes"),
            ("GET", "/logs"),
            ("GET", "/events"),
            ("GET", f"/events?uid={made['uid']}"),
            ("GET", f"/events?last_event_id={made['uid']}.0"),
            ("POST", "/snapshots"),
        ):
            answer = await server.http.request(method, f"/v1/environments/fuse-t1{path}", headers=theirs)
            assert (answer.status_code, _reason(answer)) == (404, "environment_not_found"), path
        command = await server.http.post("/v1/environments/fuse-t1?action=exec", json={"cmd": ["true"]}, headers=theirs)
        assert command.status_code == 404
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(
                server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t1/shell", additional_headers=theirs
            )
        assert caught.value.response.status_code == 404
        assert (await server.http.get("/v1/environments/fuse-t1", headers=ours)).json()["state"] == "running"


async def test_a_tenant_learns_of_another_ones_task_only_that_its_id_is_taken() -> None:
    async with running(auth_token=TOKEN) as server:
        ours, theirs = await _as(server, tenant="ours"), await _as(server, tenant="theirs")
        body = {"task_id": "t1"}
        assert (await server.http.post("/v1/environments", json=body, headers=ours)).status_code == 201
        taken = await server.http.post("/v1/environments", json=body, headers=theirs)
        assert (taken.status_code, _reason(taken)) == (409, "task_exists")
        assert (await server.http.delete("/v1/environments/fuse-t1", headers=ours)).status_code == 204
        for headers, reason in ((ours, "ended"), (theirs, "environment_not_found")):
            ended = await server.http.get("/v1/environments/fuse-t1", headers=headers)
            assert (ended.status_code, _reason(ended)) == (404, reason)
        assert (await server.http.post("/v1/environments", json=body, headers=theirs)).status_code == 201


async def test_a_tenant_hears_of_its_own_environments_only() -> None:
    async with running(auth_token=TOKEN) as server:
        ours, theirs = await _as(server, tenant="ours"), await _as(server, tenant="theirs")
        async with (
            stream(server, "/v1/events", headers=ours) as mine,
            stream(server, "/v1/events", headers=MASTER) as all_,
        ):
            for task_id, headers in (("t2", theirs), ("t1", ours)):
                made = await server.http.post("/v1/environments", json={"task_id": task_id}, headers=headers)
                assert made.status_code == 201
            assert (await next_message(mine))[1]["vm_id"] == "fuse-t1"
            assert (await next_message(all_))[1]["vm_id"] == "fuse-t2"


async def test_a_tenant_cannot_resume_from_another_ones_event() -> None:
    async with running(auth_token=TOKEN) as server:
        ours, theirs = await _as(server, tenant="ours"), await _as(server, tenant="theirs")
        made = (await server.http.post("/v1/environments", json={"task_id": "t"}, headers=ours)).json()
        last = {"Last-Event-ID": f"{made['uid']}.1"}
        answer = await server.http.get("/v1/environments/fuse-t/events", headers=theirs | last)
        assert answer.status_code == 404


async def test_without_a_master_token_a_key_still_acts_as_itself() -> None:
    async with running() as server:
        made = (await server.http.post("/v1/api-keys", json={"tenant": "ours"})).json()
        headers = {"Authorization": f"Bearer {made['key']}"}
        await server.create("t1")
        assert (await server.http.get("/v1/environments/fuse-t1", headers=headers)).status_code == 404
        assert (await server.http.get("/v1/api-keys", headers=headers)).status_code == 403
        wrong = {"Authorization": f"Bearer {made['key']}x"}
        assert (await server.http.get("/v1/environments", headers=wrong)).status_code == 401
        assert (await server.http.get("/v1/environments", headers={"Authorization": "Bearer any"})).status_code == 200


# -- what lasts ----------------------------------------------------------------------------------------------------


async def _revoked(server: Running) -> tuple[dict[str, str], Callable[[], Awaitable[object]]]:
    """Headers of a fresh key, and how to revoke it."""
    made = await _key(server)

    async def revoke() -> None:
        assert (await server.http.delete(f"/v1/api-keys/{made['id']}", headers=MASTER)).status_code == 204

    return {"Authorization": f"Bearer {made['key']}"}, revoke


@pytest.mark.parametrize("path", ["/v1/events", "/v1/environments/fuse-t1/events"])
@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_stream_of_events_ends_with_its_key(path: str, is_busy: bool) -> None:
    async with running(auth_token=TOKEN, headers=MASTER) as server:
        await server.create()
        headers, revoke = await _revoked(server)
        async with asyncio.timeout(TIMEOUT_S), server.http.stream("GET", path, headers=headers) as answer:
            assert answer.status_code == 200
            await revoke()
            async with waking(server) if is_busy else contextlib.nullcontext():
                async for _ in answer.aiter_raw():
                    pass  # to its clean end


class UploadHost(FakeHost):
    """Takes what is uploaded until it is cut off."""

    def __init__(self) -> None:
        super().__init__("h1")
        self.is_uploading, self.was_cut_off = asyncio.Event(), asyncio.Event()

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        assert request.body is not None
        assert not isinstance(request.body, bytes)
        try:
            async for _ in request.body:
                self.is_uploading.set()
        except asyncio.CancelledError:
            self.was_cut_off.set()
            raise
        return FakeAnswer(204, {}, b"")


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "processes/1?action=stdin"), ("PUT", "files?path=/a"), ("PUT", "archive?path=/a")]
)
async def test_an_upload_is_cut_off_with_its_key(method: str, path: str) -> None:
    host = UploadHost()

    async def content() -> AsyncIterator[bytes]:
        yield b"some"
        await host.is_uploading.wait()
        await revoke()
        await host.was_cut_off.wait()

    async with running(host, auth_token=TOKEN, headers=MASTER) as server:
        await server.create()
        headers, revoke = await _revoked(server)
        async with asyncio.timeout(TIMEOUT_S):
            answer = await server.http.request(
                method, f"/v1/environments/fuse-t1/{path}", content=content(), headers=headers
            )
        assert (answer.status_code, "revoked" in answer.text) == (401, True)


async def test_a_stream_of_events_ends_with_its_session() -> None:
    clock = ShiftedClock()
    async with running(auth_token=TOKEN, headers=MASTER, clock=clock) as server:
        login = await server.http.post("/login", json={"token": TOKEN})
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(base_url=server.url, cookies=login.cookies) as browser,
            browser.stream("GET", "/v1/events") as answer,
        ):
            assert answer.status_code == 200
            clock.shift_ms += LIFE_S * 1000
            async for _ in answer.aiter_raw():
                pass


async def test_a_terminal_ends_with_its_key_and_says_why() -> None:
    async with running(auth_token=TOKEN, headers=MASTER) as server:
        await server.create()
        headers, revoke = await _revoked(server)
        url = server.url.replace("http", "ws", 1) + "/v1/environments/fuse-t1/shell"
        async with asyncio.timeout(TIMEOUT_S), websockets.connect(url, additional_headers=headers) as socket:
            await revoke()
            frames = [decode_message(message) async for message in _until_closed(socket)]
            assert frames[-1].type is FrameType.ERROR
            assert b"revoked" in frames[-1].payload
            assert socket.close_code == POLICY_VIOLATION


async def _until_closed(socket: websockets.ClientConnection) -> AsyncIterator[bytes]:
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            message = await socket.recv()
            assert isinstance(message, bytes)
            yield message


class FollowedHost(FakeHost):
    """What is followed on it has no end."""

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        answer = await super().relay(request)
        answer.chunks = self._chunks
        return answer

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield b"booting\n"
        await asyncio.Event().wait()


async def test_what_is_followed_is_cut_off_with_its_key() -> None:
    async with running(FollowedHost("h1"), auth_token=TOKEN, headers=MASTER) as server:
        await server.create()
        headers, revoke = await _revoked(server)
        url = "/v1/environments/fuse-t1/logs?follow=true"
        async with asyncio.timeout(TIMEOUT_S), server.http.stream("GET", url, headers=headers) as answer:
            assert answer.status_code == 200
            await revoke()
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in answer.aiter_raw():
                    pass


async def test_a_database_that_is_away_ends_no_stream() -> None:
    caller = Caller(key_id="ak_1", key_prefix="p")
    async with running() as server:

        class Away:
            async def find_key(self, _prefix: str) -> None:
                raise StoreUnreachable(problem="no connection")

        await check_standing(replace(server.plane, store=cast("Store", Away())), caller)
        with pytest.raises(Unauthorized):
            await check_standing(server.plane, caller)
