"""Creates whose environment ends instead of coming up: the answer is why."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from control_harness import Running, running, until

from fusevm.core.policy import Policy
from fusevm.model.errors import (
    BootFailed,
    BootTimeout,
    CommandFailed,
    Error,
    HostGone,
    ImageCorrupt,
    MachineEnded,
    MachineGone,
    SetupTimeout,
)
from fusevm.model.event import HostLost
from fusevm.testing.fake_host import FakeHost
from fusevm.wire.errors import parse_error

URL = "/v1/environments"


async def ended(server: Running, answer: httpx.Response) -> tuple[type[Error], dict[str, Any]]:
    """The class of the answer, and the record that it names."""
    error = parse_error(answer.status_code, answer.content)
    assert (error.status, error.code) == (answer.status_code, answer.json()["error"]["code"])
    assert error.details["id"] == "fuse-t1"
    shown = (await server.http.get(error.details["record"])).json()
    assert shown["uid"] == error.details["uid"]
    return type(error), shown


@pytest.mark.parametrize(
    "refusal",
    [
        BootFailed(id="m", problem="kernel panic"),
        ImageCorrupt(image="debian-12", path="/i", problem="cut off"),
        CommandFailed(command="ip link", exit_status=1, stderr="no"),
    ],
    ids=lambda error: error.reason,
)
async def test_a_boot_that_the_host_refuses_is_the_answer_of_the_create(refusal: Error) -> None:
    async with running() as server:
        server.host.script("create", refusal)
        answer = await server.http.post(URL, json={"task_id": "t1"})
        told = answer.json()["error"]
        assert (answer.status_code, told["code"], told["message"]) == (refusal.status, refusal.code, refusal.message)
        cls, shown = await ended(server, answer)
        assert (cls, shown["reason"], shown["error"]) == (type(refusal), refusal.reason, refusal.message)
        # Only what is known is said: neither the id of the machine nor an exit status of 0.
        assert set(told["details"]) == {"reason", "id", "uid", "record"}


async def _lose_host(server: Running) -> None:
    env = await server.plane.store.live("t1")
    assert env is not None
    await server.plane.entry.feed(env.uid, HostLost(cause="test", host_id="h1"))


async def _crash(server: Running) -> None:
    server.host.crash(next(iter(server.host.table)))


async def _forget(server: Running) -> None:
    server.host.forget(next(iter(server.host.table)))


async def _wait(_server: Running) -> None:
    """Its time comes."""


FILES = {"files": {"/etc/a": "YQ=="}}


@pytest.mark.parametrize(
    ("held", "happens", "error"),
    [
        ("create", _lose_host, HostGone),
        ("create", _wait, BootTimeout),
        ("relay", _crash, MachineEnded),
        ("relay", _forget, MachineGone),
        ("relay", _wait, SetupTimeout),
    ],
    ids=["host_lost", "boot_timeout", "machine_exited", "machine_missing", "setup_timeout"],
)
async def test_what_comes_between_is_the_answer_of_the_create(
    held: str, happens: Callable[[Running], Awaitable[None]], error: type[Error]
) -> None:
    policy = Policy(boot_deadline_ms=300, setup_deadline_ms=300) if happens is _wait else Policy()
    async with running(FakeHost("h1"), policy=policy) as server:
        server.host.hold[held] = asyncio.Event()
        creating = asyncio.ensure_future(server.http.post(URL, json={"task_id": "t1", **FILES}))
        await until(lambda: server.host.count(held))
        await happens(server)
        cls, shown = await ended(server, await creating)
        assert (cls, shown["reason"], shown["code"]) == (error, error.reason, error.code)
        server.host.hold.pop(held).set()


async def test_a_repetition_under_the_same_key_gets_the_same_answer_and_makes_nothing() -> None:
    async with running() as server:
        server.host.script("create", BootFailed(id="m", problem="kernel panic"))
        headers = {"idempotency-key": "k"}
        first = await server.http.post(URL, json={"task_id": "t1"}, headers=headers)

        async def is_gone() -> bool:
            return (await server.get()).status_code == 404

        await until(is_gone)
        again = await server.http.post(URL, json={"task_id": "t1"}, headers=headers)
        assert (again.status_code, again.json()) == (first.status_code, first.json()) == (503, first.json())
        assert again.headers["idempotency-replayed"] == "true"
        assert server.host.count("create") == 1


async def test_who_does_not_wait_is_told_by_the_record() -> None:
    async with running() as server:
        server.host.script("create", BootFailed(id="m", problem="kernel panic"))
        answer = await server.http.post(URL, json={"task_id": "t1"}, headers={"prefer": "respond-async"})
        assert answer.status_code == 202
        uid = answer.json()["uid"]

        async def has_failed() -> bool:
            return (await server.get(uid=uid)).json().get("reason") == "boot_failed"

        await until(has_failed)
