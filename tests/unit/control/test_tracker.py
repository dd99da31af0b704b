"""Who is asked in which order for the state of daemons and health checks."""

import asyncio

import pytest
from control_harness import running

from fusevm.control import tracker
from fusevm.control.host_api import GuestRequest
from fusevm.control.tracker import Tracker
from fusevm.testing.fake_host import FakeAnswer, FakeHost


class PartlySick(FakeHost):
    """Some of its guests hang."""

    def __init__(self) -> None:
        super().__init__()
        self.sick: set[str] = set()
        self.asked: list[str] = []

    async def relay(self, request: GuestRequest) -> FakeAnswer:
        self.asked.append(request.machine_id)
        if request.machine_id in self.sick:
            await asyncio.Event().wait()
        return await super().relay(request)


async def test_guests_that_answer_do_not_wait_for_those_that_were_silent_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "LOOK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(tracker, "AT_ONCE", 1)
    host = PartlySick()
    async with running(host, reconcile_s=3_600.0) as server:
        made = [await server.create(name, healthcheck={"exec": ["true"]}) for name in ("a", "b", "c")]
        environments = [await server.record(env["uid"]) for env in made]
        first, second, third = (env.machine_id for env in environments)
        looking = Tracker(server.plane.entry, server.plane.store.cluster, server.plane.vault)

        async def look(*sick: str) -> list[str]:
            host.sick, host.asked = set(sick), []
            await looking.look(host, environments)
            return host.asked

        assert await look(first, second) == [first, second, third]
        assert await look(second) == [third, first, second]
        assert await look() == [first, third, second]
        assert await look() == [first, second, third]
