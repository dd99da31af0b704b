"""Every error that a route's table names can be answered by it, as its class."""

import asyncio

import pytest
from control_harness import Running, running, until

from fusevm.control import call
from fusevm.control.store.sql_store import SqlStore
from fusevm.control.store.statements import one
from fusevm.model.errors import Error, HostNotFound, WrongState, field_names
from fusevm.wire.errors import parse_error
from fusevm.wire.routes import ROUTES, errors_of

BY_NAME = {route.name: route for route in ROUTES}
#: Route to a request for it, inside of a running environment.
RELAYED = {
    "exec_command": ("POST", "?action=exec", {"cmd": ["true"]}),
    "read_file": ("GET", "/files?path=/x", None),
    "write_file": ("PUT", "/files?path=/x", None),
    "move_path": ("POST", "/files?op=move", {"path": "/x", "to": "/y"}),
    "start_process": ("POST", "/processes", {"cmd": ["true"]}),
    "signal_process": ("POST", "/processes/1?action=signal", {"signal": "TERM"}),
    "write_process_stdin": ("POST", "/processes/1?action=stdin", None),
    "read_logs": ("GET", "/logs", None),
}
#: Made by the control plane itself, before a host is asked.
OURS = {
    "environment_not_found",
    "ended",
    "wrong_state",
    "idempotency_key_reused",
    "idempotency_in_progress",
    "unauthorized",
    "forbidden",
    "store_full",
    "shutting_down",
}


def _sample(cls: type[Error]) -> Error:
    return cls(**{name: (7 if kind is int else "x") for name, kind in field_names(cls).items()})


async def _ask(server: Running, name: str) -> tuple[int, Error]:
    method, path, body = RELAYED[name]
    answer = await server.http.request(method, f"/v1/environments/fuse-t1{path}", json=body)
    return answer.status_code, parse_error(answer.status_code, answer.content)


@pytest.mark.parametrize("name", RELAYED)
async def test_every_error_of_a_host_or_guest_passes(name: str) -> None:
    async with running() as server:
        await server.create()
        for cls in errors_of(BY_NAME[name]):
            if cls.reason in OURS:
                continue
            sent = _sample(cls)
            server.host.script("relay", sent)
            status, error = await _ask(server, name)
            assert (status, type(error), error.details) == (cls.status, cls, sent.details)


async def test_an_error_of_no_table_is_still_itself() -> None:
    async with running(checked=False) as server:
        await server.create()
        server.host.script("relay", HostNotFound(id="x"))
        assert (await _ask(server, "read_logs"))[0] == 404
        server.plane.metrics.errors.clear()


async def test_a_full_disk_refuses_changes_and_goes_on_reading() -> None:
    async with running() as server:
        store = server.plane.store
        assert isinstance(store, SqlStore)
        await server.create("t0")
        pages = await store._engine.read(lambda: one("", tail="pragma page_count"))
        await store._engine.read(lambda: one("", tail=f"pragma max_page_count = {pages[0]}"))
        codes = {}
        for number in range(1, 40):
            answer = await server.http.post("/v1/environments", json={"task_id": f"t{number}"})
            codes[answer.status_code] = answer.json()
            if answer.status_code == 503:
                break
        assert codes[503]["error"]["details"]["reason"] == "store_full"
        assert (await server.get("t0")).status_code == 200
        await store._engine.read(lambda: one("", tail="pragma max_page_count = 100000"))
        assert (await server.http.post("/v1/environments", json={"task_id": "after"})).status_code == 201

        async def is_settled() -> bool:
            listed = (await server.http.get("/v1/environments")).json()["environments"]
            return all(env["state"] == "running" for env in listed)

        await until(is_settled)


async def test_a_body_that_does_not_arrive_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "BODY_TIMEOUT_S", 0)
    async with running() as server:
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/environments HTTP/1.1\r\nhost: {host}\r\ncontent-length: 10\r\n\r\n"
        writer.write(head.encode() + b"{")
        async with asyncio.timeout(60):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 504 ")
        writer.close()
        await writer.wait_closed()


def test_wrong_state_says_what_is_wanted() -> None:
    error = WrongState(id="fuse-t", state="draining", wanted="only a running environment can do this")
    assert error.message == "fuse-t is draining; only a running environment can do this"
