"""Registering hosts, their tokens, and the stub host."""

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from control_harness import FAST, until
from msgspec.structs import replace

from fusevm.control.config import ControlConfig, HostSetting
from fusevm.control.entry import Asked
from fusevm.control.host_api import GuestRequest
from fusevm.control.host_client import HttpHost
from fusevm.control.main import open_plane
from fusevm.control.outcome import host_name
from fusevm.control.plane import Plane
from fusevm.control.stub_host import StubHost
from fusevm.core.spec import complete
from fusevm.model.environment import State
from fusevm.model.errors import BadSetting, HostNotFound, MachineNotFound, NotSupported, StaleIncarnation, WrongCluster
from fusevm.model.host import HostState, Resources
from fusevm.model.machine import Fence, MachineSpec
from fusevm.testing.fake_host import FakeHost
from fusevm.wire.host_api import CreateMachine

DEFAULT = HostSetting(id="default", url="http://127.0.0.1:1", token="hush-hush")


@contextlib.asynccontextmanager
async def plane(
    path: str = ":memory:", *hosts: HostSetting, fake: FakeHost | None = None, **changes: object
) -> AsyncIterator[Plane]:
    config = ControlConfig(database=path, hosts=hosts, **{**FAST, **changes})  # type: ignore[arg-type]
    fakes = {host.id: fake or FakeHost(host.id) for host in hosts}
    async with open_plane(config, clients=fakes) as opened:
        yield opened


async def test_without_hosts_there_is_a_stub() -> None:
    async with plane() as at:
        (host,) = await at.store.hosts()
        assert (host.id, host.url, host.driver) == ("stub", "stub:", "stub")
        assert isinstance(await at.directory.client("stub"), StubHost)
        with pytest.raises(HostNotFound):
            await at.directory.client("nowhere")


async def test_a_host_that_cannot_be_read_is_replaced_by_no_stub(tmp_path: Path) -> None:
    path = tmp_path / "fuse.db"
    async with plane(str(path), DEFAULT):
        pass
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("update hosts set doc = '{'")
    async with plane(str(path)) as at:
        assert await at.store.hosts() == []
        assert await at.store.host("stub") is None


async def test_a_registration_is_idempotent_and_never_disowns(tmp_path: Path) -> None:
    path, fake = str(tmp_path / "fuse.db"), FakeHost("default")
    async with plane(path, DEFAULT, fake=fake) as at:
        env = await at.entry.begin(at.entry.new_identity("t"), Asked(spec=complete(at.config.policy)), cause="test")
        host = await at.store.host("default")
        assert host is not None
        await at.store.save_host(replace(host, state=HostState.CORDONED))
    async with plane(path, replace(DEFAULT, url="http://127.0.0.1:2"), fake=fake) as at:
        again = await at.store.host("default")
        assert again is not None
        assert (again.url, again.state) == ("http://127.0.0.1:2", HostState.CORDONED)
        assert again.created_at_ms == host.created_at_ms
        assert again.allocated.vm_count == 1
        assert (await at.store.get(env.uid)) is not None


async def test_a_restart_keeps_what_was_declared_of_a_host_over_the_api(tmp_path: Path) -> None:
    path, fake = str(tmp_path / "fuse.db"), FakeHost("default")
    declared = {
        "region": "north",
        "labels": {"disk": "fast"},
        "declared": Resources(cpus=2),
        "capacity": Resources(cpus=2, ram_mb=1 << 20, storage_gb=10_000, vm_count=1000),
    }
    async with plane(path, DEFAULT, fake=fake) as at:
        host = await at.store.host("default")
        assert host is not None
        await at.directory.save(replace(host, **declared), "")
    async with plane(path, DEFAULT, fake=fake) as at:
        again = await at.store.host("default")
        assert again is not None
        assert {name: getattr(again, name) for name in declared} == declared
        asked = Asked(spec=complete(at.config.policy, region="north", labels={"disk": "fast"}))
        assert (await at.entry.begin(at.entry.new_identity("t"), asked, cause="test")).host_id == "default"


async def test_a_start_with_the_settings_of_the_last_one_changes_no_record(tmp_path: Path) -> None:
    path, fake = str(tmp_path / "fuse.db"), FakeHost("default")
    async with plane(path, DEFAULT, fake=fake, heartbeat_s=3_600.0) as at:
        first = await at.store.host("default")
        sealed = await at.store.get_secret("host:default", "token")
    async with plane(path, DEFAULT, fake=fake, heartbeat_s=3_600.0) as at:
        again = await at.store.host("default")
        assert first is not None
        assert again is not None
        assert again.revision == first.revision
        assert await at.store.get_secret("host:default", "token") == sealed


async def test_a_new_token_replaces_one_that_no_key_opens_any_more(tmp_path: Path) -> None:
    path, fake = str(tmp_path / "fuse.db"), FakeHost("default")
    async with plane(path, DEFAULT, fake=fake):
        pass
    async with plane(path, DEFAULT, fake=fake, encryption_key="ab" * 32) as at:
        assert await at.directory.token_of("default") == "hush-hush"


async def test_a_token_is_kept_sealed_for_the_next_start(tmp_path: Path) -> None:
    path = str(tmp_path / "fuse.db")
    async with plane(path, DEFAULT):
        pass
    assert b"hush-hush" not in (tmp_path / "fuse.db").read_bytes()
    async with plane(path) as at:
        at.directory._fixed.clear()
        client = await at.directory.client("default")
        assert isinstance(client, HttpHost)
        assert client._endpoint.secret == "hush-hush"
    async with plane(path, encryption_key="ab" * 32) as at:
        with pytest.raises(BadSetting, match="another key"):
            await at.directory.client("default")


async def test_a_real_host_takes_over_from_the_stub(tmp_path: Path) -> None:
    path = str(tmp_path / "fuse.db")
    async with plane(path) as at:
        env = await at.entry.begin(at.entry.new_identity("t"), Asked(spec=complete(at.config.policy)), cause="test")

        async def is_running() -> bool:
            found = await at.store.get(env.uid)
            return found is not None and found.state is State.RUNNING

        await until(is_running)
    async with plane(path, DEFAULT) as at:
        stub = await at.store.host("stub")
        assert stub is not None
        assert stub.state is HostState.CORDONED

        async def is_missing() -> bool:
            found = await at.store.get(env.uid)
            return found is not None and found.ending is not None and found.ending.reason == "machine_missing"

        await until(is_missing)


FENCE = Fence(cluster="c", uid="u", incarnation=1, action_seq=1)
ORDER = CreateMachine(machine_id="m-1", spec=MachineSpec(image="x"))


async def test_the_stub_keeps_the_rules_of_a_host() -> None:
    stub = StubHost("1")
    made = await stub.create(FENCE, ORDER)
    assert await stub.create(FENCE, ORDER) == made
    with pytest.raises(WrongCluster):
        await stub.create(replace(FENCE, cluster="d"), ORDER)
    with pytest.raises(WrongCluster):
        await stub.destroy(replace(FENCE, cluster="d"), "m-1")
    await stub.destroy(FENCE, "m-1")
    await stub.destroy(FENCE, "m-1")
    with pytest.raises(StaleIncarnation):
        await stub.create(FENCE, ORDER)
    assert (await stub.create(replace(FENCE, incarnation=2), replace(ORDER, machine_id="m-2"))).id == "m-2"


async def test_the_stub_says_what_it_would_run_and_no_more() -> None:
    stub = StubHost("1")
    await stub.create(FENCE, ORDER)
    request = GuestRequest(
        fence=FENCE, machine_id="m-1", method="POST", target="guest/exec", body=b'{"cmd":["echo","a b"]}'
    )
    answer = await stub.relay(request)
    body = b"".join([chunk async for chunk in answer.chunks()])
    assert b"exit_code" in body
    await answer.close()
    with pytest.raises(NotSupported):
        await stub.relay(replace(request, target="guest/files?path=/x", method="GET"))
    with pytest.raises(NotSupported):
        await stub.open_frames(FENCE, "m-1")
    with pytest.raises(MachineNotFound):
        await stub.relay(replace(request, machine_id="m-2"))


@pytest.mark.parametrize(
    ("task_id", "name"), [("A_b.1", "a-b-1"), ("-x-", "x"), ("...", "fuse"), ("a" * 90, "a" * 63), ("ok", "ok")]
)
def test_host_names_are_labels(task_id: str, name: str) -> None:
    assert host_name(task_id) == name
