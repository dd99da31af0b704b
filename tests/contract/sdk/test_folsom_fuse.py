"""The unmodified SDK of the contract (folsom-fuse) against a real server process."""

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import fuse
import pytest
import uvicorn
from control_process import serving
from fuse import errors, types

from fusevm.control.main import HttpServer
from fusevm.model.errors import BootFailed
from fusevm.testing.fake_host import FakeHost, fake_host_app
from fusevm.testing.simulated_hosts import running_hosts

TOKEN = "sdk-token"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("sdk"), "--auth-token", TOKEN) as server:
        yield server.url
        assert server.end() == 0


@pytest.fixture
def client(url: str) -> Iterator[fuse.Client]:
    with fuse.Client(url, TOKEN) as opened:
        yield opened


@pytest.fixture
def task_id(request: pytest.FixtureRequest) -> str:
    return request.node.name[:60].replace("[", ".").replace("]", "")


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_the_life_of_an_environment(client: fuse.Client, task_id: str) -> None:
    made = client.environments.create(types.CreateRequest(task_id=task_id))
    assert isinstance(made, types.EnvironmentInfo)
    assert (made.id, made.state, made.task_id) == ("fuse-" + task_id, types.STATE_RUNNING, task_id)
    assert (made.spec.cpus, made.spec.ram_mb, made.spec.storage_gb) == (1, 512, 4)
    assert made.created_at is not None
    assert made.egress is not None
    assert made.egress.mode == "direct"
    got = client.environments.get(made.id)
    assert got == made
    assert made.id in [env.id for env in client.environments.list()]
    assert [env.id for env in client.environments.list(task_id=task_id)] == [made.id]
    assert client.environments.list(task_id=task_id, state="draining") == []
    ran = client.environments.exec(made.id, types.ExecRequest(cmd=["echo", "hello"]))
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "stub host: echo hello\n", "")
    shell = client.environments.exec(made.id, types.ExecRequest(shell="echo $HOME", timeout_ms=1000))
    assert shell.stdout == "stub host: echo $HOME\n"
    drained = client.environments.drain(made.id)
    assert drained.state == types.STATE_DRAINING
    assert client.environments.destroy(made.id) is None
    with pytest.raises(errors.ApiError) as caught:
        client.environments.get(made.id)
    assert errors.is_not_found(caught.value)
    assert caught.value.details["reason"] == "ended"


def test_every_optional_that_can_be_honoured(client: fuse.Client, task_id: str) -> None:
    spec = types.Spec(
        cpus=2,
        ram_mb=1024,
        storage_gb=8,
        image="debian-12",
        arch="x86_64",
        max_runtime_seconds=600,
        idle_timeout_seconds=60,
        host_id="stub",
        labels={},
        gpus=0,
        gpu_kind="",
        huge_pages=False,
    )
    request = types.CreateRequest(
        task_id=task_id,
        spec=spec,
        manifest_inline=_base64(json.dumps({"version": 1, "workspace": "/workspace", "env": {"A": "b"}})),
        secrets={"PASSWORD": "correct horse battery staple"},
        files={"/etc/motd": _base64("hello")},
        expose=[],
        startup_script="echo started",
        gateway_url="https://gateway.example",
        gateway_token="gateway-token",
        healthcheck=types.HealthcheckSpec(
            http=types.HealthcheckHttp(port=80, path="/ready"),
            interval_seconds=10,
            timeout_seconds=5,
            retries=2,
            start_period_seconds=1,
        ),
        egress=types.EgressSpec(mode="direct"),
    )
    made = client.environments.create(request)
    assert (made.state, made.error) == (types.STATE_RUNNING, "")
    assert (made.spec.cpus, made.spec.arch, made.spec.idle_timeout_seconds) == (2, "amd64", 60)
    got = client.environments.get(made.id)
    assert got.spec == made.spec
    client.environments.destroy(made.id)


def test_empty_optionals_mean_unset(client: fuse.Client, task_id: str) -> None:
    request = types.CreateRequest(
        task_id=task_id,
        spec=types.Spec(cpus=0, ram_mb=0, storage_gb=0, region="", image="", arch="", host_id="", labels={}),
        manifest_inline="",
        secrets={},
        files={},
        expose=[],
        startup_script="",
        gateway_url="",
        gateway_token="",
    )
    made = client.environments.create(request)
    assert (made.spec.cpus, made.spec.ram_mb, made.spec.storage_gb) == (1, 512, 4)
    assert made.health is None
    client.environments.destroy(made.id)


def test_a_healthcheck_by_command_and_its_verdict(client: fuse.Client, task_id: str) -> None:
    check = types.HealthcheckSpec(exec=["true"])
    made = client.environments.create(types.CreateRequest(task_id=task_id, healthcheck=check))
    verdicts = (types.HEALTH_STARTING, types.HEALTH_PASSING, types.HEALTH_FAILING)
    assert made.health is None or made.health.state in verdicts
    client.environments.destroy(made.id)


WRONG: list[dict[str, Any]] = [
    {"manifest_inline": "not base64!"},
    {"manifest_inline": "e30"},
    {"secrets": {"": "x"}},
    {"files": {"relative": "YQ=="}},
    {"files": {"/fuse/mine": "YQ=="}},
    {"files": {"/a": "not base64!"}},
    {"healthcheck": types.HealthcheckSpec()},
    {"healthcheck": types.HealthcheckSpec(exec=["true"], http=types.HealthcheckHttp(port=80))},
    {"healthcheck": types.HealthcheckSpec(exec=["true"], interval_seconds=1, timeout_seconds=2)},
    {"healthcheck": types.HealthcheckSpec(http=types.HealthcheckHttp(port=80, path="ready"))},
    {"spec": types.Spec(arch="sparc")},
    {"spec": types.Spec(idle_timeout_seconds=5)},
    {"spec": types.Spec(max_runtime_seconds=-2)},
]


@pytest.mark.parametrize("wrong", WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_cannot_be_meant_is_an_invalid_argument(client: fuse.Client, wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.ApiError) as caught:
        client.environments.create(types.CreateRequest(task_id="wrong", **wrong))
    assert errors.is_invalid_argument(caught.value), caught.value


LATER: list[dict[str, Any]] = [
    {"desktop": types.DesktopSpec(width=640, height=480, wm="mutter")},
    {"egress": types.EgressSpec(mode="proxy", provider="mock", protocol="http")},
    {"spec": types.Spec(gpus=1)},
    {"spec": types.Spec(gpu_kind="h100")},
    {"spec": types.Spec(gpu_profile="1g.10gb")},
    {"spec": types.Spec(huge_pages=True)},
]


@pytest.mark.parametrize("later", LATER, ids=[f"{number}-{next(iter(item))}" for number, item in enumerate(LATER)])
def test_what_comes_later_is_unimplemented_and_named(client: fuse.Client, later: dict[str, Any]) -> None:
    with pytest.raises(errors.ApiError) as caught:
        client.environments.create(types.CreateRequest(task_id="later", **later))
    assert (caught.value.status, caught.value.code) == (501, "unimplemented")
    assert not errors.is_conflict(caught.value)


def test_events_until_the_end(client: fuse.Client, task_id: str) -> None:
    made = client.environments.create(types.CreateRequest(task_id=task_id))
    seen: list[types.Event] = []
    first = threading.Event()

    def read() -> None:
        for event in client.environments.events(made.id):
            seen.append(event)
            first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(120)
    client.environments.destroy(made.id)
    reader.join(120)
    assert not reader.is_alive()
    assert [event.state for event in seen] == ["running", "destroying", "destroyed"]
    assert all(event.kind == "state" and event.vm_id == made.id and event.err is None for event in seen)
    assert all(event.updated_at is not None for event in seen)
    assert seen[0].id == ""
    after = [event.state for event in client.environments.events(made.id)]
    assert after[-1] == "destroyed"
    assert types.is_terminal_state(after[-1])


def test_lists_of_many_pages_end(client: fuse.Client, task_id: str) -> None:
    names = [f"{task_id}-{number:03}" for number in range(205)]
    for name in names:
        client.environments.create(types.CreateRequest(task_id=name))
    listed = [env.task_id for env in client.environments.list(state="running", host_id="stub")]
    # Each once. In the order of the wall clock, which may step back between two of them.
    assert sorted(name for name in listed if name.startswith(task_id)) == names
    page = client.environments.list_page(limit=2)
    assert len(page.environments) == 2
    assert page.next_cursor
    following = client.environments.list_page(limit=2, cursor=page.next_cursor)
    assert following.environments[0].id != page.environments[0].id
    for name in names:
        client.environments.destroy("fuse-" + name)


def test_errors_satisfy_the_predicates(client: fuse.Client, url: str, task_id: str) -> None:
    def failure(call: Any) -> errors.ApiError:
        with pytest.raises(errors.ApiError) as caught:
            call()
        assert caught.value.request_id.startswith("req_")
        assert caught.value.message
        return caught.value

    envs = client.environments
    assert errors.is_not_found(failure(lambda: envs.get("fuse-nothing")))
    assert errors.is_not_found(failure(lambda: envs.get("no/such id")))
    assert errors.is_not_found(failure(lambda: envs.destroy("fuse-nothing")))
    assert errors.is_not_found(failure(lambda: list(envs.events("fuse-nothing"))))
    assert errors.is_not_found(failure(lambda: client.hosts.get("nothing")))
    assert errors.is_invalid_argument(failure(lambda: envs.create(types.CreateRequest(task_id="a b"))))
    spec = types.Spec(cpus=-1)
    assert errors.is_invalid_argument(failure(lambda: envs.create(types.CreateRequest(task_id="a", spec=spec))))
    huge = types.Spec(labels={"disk": "nvme"})
    assert errors.is_unavailable(failure(lambda: envs.create(types.CreateRequest(task_id="a", spec=huge))))
    made = envs.create(types.CreateRequest(task_id=task_id))
    assert errors.is_conflict(failure(lambda: envs.create(types.CreateRequest(task_id=task_id))))
    too_long = types.ExecRequest(cmd=["a"], timeout_ms=700_000)
    assert errors.is_invalid_argument(failure(lambda: envs.exec(made.id, too_long)))
    envs.drain(made.id)
    assert errors.is_conflict(failure(lambda: envs.exec(made.id, types.ExecRequest(cmd=["true"]))))
    envs.destroy(made.id)
    with fuse.Client(url, "wrong") as stranger:
        assert errors.is_unauthorized(failure(stranger.environments.list))
    with fuse.Client(url) as nobody:
        assert errors.is_unauthorized(failure(nobody.environments.list))


# -- every method --------------------------------------------------------------------------------------------------


class Things(NamedTuple):
    """What the calls of the table are about."""

    env: types.EnvironmentInfo
    snapshot: types.Snapshot
    key: types.APIKey
    #: A host that was registered and has nothing on it.
    host: str
    #: Where a host daemon answers.
    url: str


#: Every method of the SDK: a call that succeeds, and the type of its answer; 501: it is not built yet.
METHODS: dict[str, tuple[Callable[[fuse.Client, Things], Any], Any]] = {
    "environments.create": (lambda c, t: c.environments.create(types.CreateRequest(task_id="new")), "EnvironmentInfo"),
    "environments.get": (lambda c, t: c.environments.get(t.env.id), "EnvironmentInfo"),
    "environments.list": (lambda c, t: c.environments.list(task_id=t.env.task_id), [types.EnvironmentInfo]),
    "environments.list_page": (lambda c, t: c.environments.list_page(limit=1), "EnvironmentPage"),
    "environments.exec": (lambda c, t: c.environments.exec(t.env.id, types.ExecRequest(shell="true")), "ExecResult"),
    "environments.drain": (lambda c, t: c.environments.drain(t.env.id), "EnvironmentInfo"),
    "environments.rotate_token": (lambda c, t: c.environments.rotate_token(t.env.id), None),
    "environments.destroy": (lambda c, t: c.environments.destroy(t.env.id), None),
    "environments.events": (lambda c, t: next(c.environments.events(t.env.id)), "Event"),
    "environments.fork": (lambda c, t: c.environments.fork(t.env.id), 501),
    "environments.migrate": (lambda c, t: c.environments.migrate(t.env.id), 501),
    "environments.computer": (
        lambda c, t: c.environments.computer(t.env.id, types.ComputerAction(action="screenshot")),
        501,
    ),
    "environments.computer_tool_result": (
        lambda c, t: c.environments.computer_tool_result(t.env.id, {"action": "screenshot"}),
        501,
    ),
    "environments.computer_display": (lambda c, t: c.environments.computer_display(t.env.id), 501),
    "snapshots.create": (lambda c, t: c.snapshots.create(t.env.id), "Snapshot"),
    "snapshots.get": (lambda c, t: c.snapshots.get(t.snapshot.id), "Snapshot"),
    "snapshots.list": (lambda c, t: c.snapshots.list(vm_id=t.env.id), [types.Snapshot]),
    "snapshots.list_page": (lambda c, t: c.snapshots.list_page(limit=1), "SnapshotPage"),
    "snapshots.resolve": (lambda c, t: c.snapshots.resolve("layer-1", "amd64"), "Snapshot"),
    "snapshots.restore": (lambda c, t: c.snapshots.restore(t.snapshot.id), None),
    "snapshots.delete": (lambda c, t: c.snapshots.delete(t.snapshot.id), None),
    "hosts.register": (lambda c, t: c.hosts.register(types.RegisterHostRequest(id="new", url=t.url)), "Host"),
    "hosts.get": (lambda c, t: c.hosts.get(t.host), "Host"),
    "hosts.list": (lambda c, t: c.hosts.list(), [types.Host]),
    "hosts.list_page": (lambda c, t: c.hosts.list_page(limit=1), "HostPage"),
    "hosts.cordon": (lambda c, t: c.hosts.cordon(t.host), None),
    "hosts.uncordon": (lambda c, t: c.hosts.uncordon(t.host), None),
    "hosts.deregister": (lambda c, t: c.hosts.deregister(t.host), None),
    "api_keys.create": (lambda c, t: c.api_keys.create("second"), "CreatedAPIKey"),
    "api_keys.list": (lambda c, t: c.api_keys.list(), [types.APIKey]),
    "api_keys.revoke": (lambda c, t: c.api_keys.revoke(t.key.id), None),
}


def test_the_table_names_every_method_of_the_sdk(client: fuse.Client) -> None:
    services = {name: service for name, service in vars(client).items() if type(service).__name__.endswith("Service")}
    assert set(services) == {"environments", "snapshots", "hosts", "api_keys"}
    methods = {f"{name}.{method}" for name, service in services.items() for method in _public(service)}
    assert methods == set(METHODS)


def _public(service: object) -> list[str]:
    return [name for name in dir(service) if not name.startswith("_") and callable(getattr(service, name))]


class Farm(NamedTuple):
    """A server, and a host that is registered with it."""

    url: str
    host_url: str


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    folder = tmp_path_factory.mktemp("farm")
    options = ("--auth-token", TOKEN, "--allow-local-hosts")
    with running_hosts(folder, 1) as (place,), serving(folder, *options) as server:
        with fuse.Client(server.url, TOKEN) as client:
            client.hosts.register(types.RegisterHostRequest(id="real", url=place.url))
        yield Farm(server.url, place.url)
        assert server.end() == 0


@pytest.fixture
def farmer(farm: Farm) -> Iterator[fuse.Client]:
    with fuse.Client(farm.url, TOKEN) as opened:
        yield opened


@pytest.fixture
def things(farm: Farm, farmer: fuse.Client, task_id: str) -> Iterator[Things]:
    env = farmer.environments.create(types.CreateRequest(task_id=task_id))
    snapshot = farmer.snapshots.create(env.id, types.SnapshotRequest(mode="build", layer_key="layer-1"))
    key = farmer.api_keys.create("first")
    farmer.hosts.register(types.RegisterHostRequest(id="spare", url=farm.host_url))
    yield Things(env, snapshot, key, "spare", farm.host_url)
    for left in farmer.environments.list():
        farmer.environments.destroy(left.id)
    for kept in farmer.snapshots.list():
        farmer.snapshots.delete(kept.id)
    for host in farmer.hosts.list():
        if host.id in ("new", "spare"):
            farmer.hosts.deregister(host.id)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_sdk(farmer: fuse.Client, things: Things, method: str) -> None:
    call, expected = METHODS[method]
    if expected == 501:
        with pytest.raises(errors.ApiError) as caught:
            call(farmer, things)
        assert (caught.value.status, caught.value.code) == (501, "unimplemented")
        assert not errors.is_conflict(caught.value)
        return
    answer = call(farmer, things)
    if isinstance(expected, list):
        assert answer
        assert {type(item) for item in answer} == {*expected}
    elif expected is None:
        assert answer is None
    else:
        assert isinstance(answer, getattr(types, expected))


def test_the_life_of_a_snapshot(farmer: fuse.Client, things: Things) -> None:
    client = farmer
    request = types.SnapshotRequest(
        comment="before the upgrade",
        mode="manual",
        retention_seconds=3600,
        metadata={"name": "base"},
        export_ref="s3://bucket/base",
        export_status="requested",
    )
    taken = client.snapshots.create(things.env.id, request)
    assert (taken.vm_id, taken.task_id, taken.state, taken.kind) == (things.env.id, things.env.task_id, "ready", "disk")
    assert (taken.comment, taken.mode, taken.export_ref) == ("before the upgrade", "manual", "s3://bucket/base")
    assert [(export.destination, export.status) for export in taken.exports] == [("s3://bucket/base", "requested")]
    assert taken.parent_snapshot_id == things.snapshot.id
    assert taken.retention_until is not None
    assert taken.created_at is not None
    assert (taken.size_bytes > 0, taken.digest != "", taken.arch) == (True, True, "amd64")
    assert client.snapshots.get(taken.id) == taken
    assert [one.id for one in client.snapshots.list(task_id=things.env.task_id)] == [taken.id, things.snapshot.id]
    assert client.snapshots.list(state="error") == []
    layer = client.snapshots.resolve("layer-1", "amd64")
    assert layer is not None
    assert (layer.id, layer.layer_key) == (things.snapshot.id, "layer-1")
    assert client.snapshots.resolve("layer-1", "arm64") is None
    client.snapshots.restore(taken.id)
    assert client.environments.get(things.env.id).state == types.STATE_RUNNING
    live = client.snapshots.create(things.env.id, types.SnapshotRequest(live=True))
    assert live.kind in ("disk", "live")
    client.snapshots.delete(taken.id)
    with pytest.raises(errors.ApiError) as caught:
        client.snapshots.get(taken.id)
    assert errors.is_not_found(caught.value)


def test_lists_of_snapshots_and_hosts_end(farmer: fuse.Client, things: Things) -> None:
    client = farmer
    more = [client.snapshots.create(things.env.id).id for _ in range(4)]
    seen: list[str] = []
    page = client.snapshots.list_page(limit=2)
    while True:
        seen += [one.id for one in page.snapshots]
        if not page.next_cursor:
            break
        page = client.snapshots.list_page(limit=2, cursor=page.next_cursor)
    assert seen == [*reversed(more), things.snapshot.id] == [one.id for one in client.snapshots.list()]
    hosts: list[str] = []
    host_page = client.hosts.list_page(limit=1)
    while True:
        hosts += [host.id for host in host_page.hosts]
        if not host_page.next_cursor:
            break
        host_page = client.hosts.list_page(limit=1, cursor=host_page.next_cursor)
    assert hosts == ["real", "spare", "stub"] == [host.id for host in client.hosts.list()]


def test_the_life_of_a_host(farmer: fuse.Client, things: Things) -> None:
    client, url = farmer, things.url
    capacity = types.HostCapacity(cpus=3, ram_mb=4096, storage_gb=50, vm_count=7, arch="amd64")
    request = types.RegisterHostRequest(
        id="spare", url=url, region="eu", labels={"disk": "nvme"}, backend="qemu", capacity=capacity
    )
    made = client.hosts.register(request)
    assert (made.id, made.url, made.region, made.state, made.labels) == ("spare", url, "eu", "active", {"disk": "nvme"})
    assert (made.capacity.cpus, made.capacity.vm_count, made.capacity.arch) == (3, 7, "amd64")
    assert any("capacity.cpus" in warning for warning in made.warnings)
    pinned = types.Spec(host_id="spare", labels={"disk": "nvme"}, region="eu", cpus=2)
    env = client.environments.create(types.CreateRequest(task_id="on-spare", spec=pinned))
    assert env.host_id == "spare"
    assert client.hosts.get("spare").allocated.cpus == 2
    client.hosts.cordon("spare")
    assert client.hosts.get("spare").state == "cordoned"
    with pytest.raises(errors.ApiError) as caught:
        client.environments.create(types.CreateRequest(task_id="too-late", spec=pinned))
    assert errors.is_unavailable(caught.value)
    client.hosts.uncordon("spare")
    with pytest.raises(errors.ApiError) as caught:
        client.hosts.deregister("spare")
    assert errors.is_conflict(caught.value)
    client.environments.destroy(env.id)
    client.hosts.deregister("spare")
    with pytest.raises(errors.ApiError) as caught:
        client.hosts.get("spare")
    assert errors.is_not_found(caught.value)


def test_a_host_that_does_not_answer_or_refuses_the_token(farmer: fuse.Client, things: Things) -> None:
    client, url = farmer, things.url
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        silent = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with pytest.raises(errors.ApiError) as caught:
        client.hosts.register(types.RegisterHostRequest(id="new", url=silent))
    assert caught.value.details["reason"] == "host_unreachable"
    declared = types.HostCapacity(cpus=1, ram_mb=1024, storage_gb=10, vm_count=1)
    made = client.hosts.register(types.RegisterHostRequest(id="new", url=silent, capacity=declared))
    assert made.warnings
    gpu = types.RegisterHostRequest(id="new", url=url, capacity=types.HostCapacity(gpus=1))
    with pytest.raises(errors.ApiError) as caught:
        client.hosts.register(gpu)
    assert (caught.value.status, caught.value.code) == (501, "unimplemented")
    with HostThread(secret="right") as guarded, pytest.raises(errors.ApiError) as caught:
        client.hosts.register(types.RegisterHostRequest(id="guarded", url=guarded.url, token="wrong"))
    assert (caught.value.status, errors.is_unauthorized(caught.value)) == (502, True)


def test_the_life_of_a_key(client: fuse.Client, url: str) -> None:
    made = client.api_keys.create("ci")
    assert made.key.startswith("fuse_sk_")
    assert (made.label, made.created_at is not None, made.revoked_at) == ("ci", True, None)
    unnamed = client.api_keys.create()
    assert unnamed.label == ""
    listed = {key.id: key for key in client.api_keys.list()}
    assert {made.id, unnamed.id} <= set(listed)
    assert type(listed[made.id]) is types.APIKey
    with fuse.Client(url, made.key) as holder:
        env = holder.environments.create(types.CreateRequest(task_id="by-key"))
        assert holder.environments.get(env.id).state == types.STATE_RUNNING
        holder.environments.destroy(env.id)
        for call in (holder.api_keys.list, lambda: holder.hosts.cordon("stub")):
            with pytest.raises(errors.ApiError) as caught:
                call()
            assert (caught.value.status, errors.is_unauthorized(caught.value)) == (403, True)
        client.api_keys.revoke(made.id)
        with pytest.raises(errors.ApiError) as caught:
            holder.environments.list()
        assert (caught.value.status, errors.is_unauthorized(caught.value)) == (401, True)
    assert {key.id: key for key in client.api_keys.list()}[made.id].revoked_at is not None
    with pytest.raises(errors.ApiError) as caught:
        client.api_keys.revoke("ak_nothing")
    assert errors.is_not_found(caught.value)


def test_create_and_iterate_until_the_end(client: fuse.Client, task_id: str) -> None:
    """The idiom of the contract's documentation, with somebody else who destroys."""
    made = client.environments.create(types.CreateRequest(task_id=task_id, startup_script="echo hello"))
    states = []
    for event in client.environments.events(made.id):
        assert event.err is None
        states.append(event.state)
        if len(states) == 1:
            client.environments.destroy(made.id)
        if types.is_terminal_state(event.state):
            break
    assert (states[0], states[-1]) == ("running", "destroyed")


def test_hosts_parse(client: fuse.Client) -> None:
    (host,) = client.hosts.list()
    assert (host.id, host.state) == ("stub", "active")
    assert host.capacity.cpus > 0
    assert host.last_seen is not None
    assert client.hosts.get("stub").id == "stub"
    assert client.hosts.list_page(limit=1).next_cursor is None


def test_a_request_id_of_the_user_comes_back(url: str) -> None:
    with fuse.Client(url, TOKEN, request_id=lambda: "mine-1") as client, pytest.raises(errors.ApiError) as caught:
        client.environments.get("fuse-nothing")
    assert caught.value.request_id == "mine-1"


class HostThread:
    """A fake host behind HTTP in a thread of its own. `is_slow`: its creates wait until they are let through."""

    def __init__(self, *, is_slow: bool = False, secret: str = "") -> None:
        self._is_slow = is_slow
        self._secret = secret
        self.host = FakeHost("default")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_through()
        self._server.should_exit = True
        self._thread.join()

    def let_through(self) -> None:
        if self._is_slow:
            self._loop.call_soon_threadsafe(self.host.hold["create"].set)

    def _run(self) -> None:
        if self._is_slow:
            self.host.hold["create"] = asyncio.Event()
        app = fake_host_app(self.host, self._secret)
        settings = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        self._server = HttpServer(settings)
        self._loop.run_until_complete(self._server.serve([self.listener]))
        self._loop.close()


def test_a_create_that_takes_too_long_is_still_an_environment(tmp_path: Path) -> None:
    """The usual loop of the contract's clients goes on: create answers with provisioning, events tell the rest."""
    with HostThread(is_slow=True) as slow:
        options = ("--host-url", slow.url, "--wait-s", "0.2")
        with serving(tmp_path, *options) as server, fuse.Client(server.url) as client:
            made = client.environments.create(types.CreateRequest(task_id="t"))
            assert made.state == types.STATE_PROVISIONING
            events = client.environments.events(made.id)
            assert next(events).state == "provisioning"
            slow.let_through()
            assert next(events).state == "running"
            client.environments.destroy(made.id)
            assert [event.state for event in events] == ["destroying", "destroyed"]


def test_a_create_that_does_not_come_up_raises(tmp_path: Path) -> None:
    """As the contract's own server answers it; what has become of the environment is where `record` says."""
    with HostThread() as thread:
        thread.host.script("create", BootFailed(id="m", problem="kernel panic"))
        with serving(tmp_path, "--host-url", thread.url) as server, fuse.Client(server.url) as client:
            with pytest.raises(errors.ApiError, match="kernel panic") as caught:
                client.environments.create(types.CreateRequest(task_id="t"))
            assert errors.is_unavailable(caught.value)
            details = caught.value.details
            assert (details["reason"], details["id"]) == ("boot_failed", "fuse-t")
            assert details["record"] == f"/v1/environments/fuse-t?uid={details['uid']}"
