"""The unmodified SDK of the contract (folsom-fuse) against a real server process."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import fuse
import pytest
import uvicorn
from control_process import serving
from fuse import errors, types

from fusevm.control.main import HttpServer
from fusevm.testing.fake_host import FakeHost, fake_host_app

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
        secrets={},
        files={},
        expose=[],
        startup_script="",
        gateway_url="",
        egress=types.EgressSpec(mode="direct"),
    )
    made = client.environments.create(request)
    assert (made.spec.cpus, made.spec.arch, made.spec.idle_timeout_seconds) == (2, "amd64", 60)
    assert client.environments.get(made.id).spec == made.spec
    client.environments.destroy(made.id)


LATER: list[dict[str, Any]] = [
    {"manifest_inline": "e30="},
    {"secrets": {"A": "b"}},
    {"startup_script": "true"},
    {"files": {"/a": "YQ=="}},
    {"gateway_url": "http://x"},
    {"gateway_token": "x"},
    {"expose": [types.ExposeSpec(port=80, as_="web", protocol="tcp")]},
    {"healthcheck": types.HealthcheckSpec(http=types.HealthcheckHttp(port=80))},
    {"desktop": types.DesktopSpec(width=640, height=480, wm="mutter")},
    {"egress": types.EgressSpec(mode="proxy", provider="mock", protocol="http")},
    {"spec": types.Spec(gpus=1)},
    {"spec": types.Spec(huge_pages=True)},
]


@pytest.mark.parametrize("later", LATER, ids=[next(iter(item)) for item in LATER])
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


def test_the_rest_of_the_contract_is_unimplemented(client: fuse.Client) -> None:
    calls: list[Any] = [
        lambda: client.environments.fork("fuse-x"),
        lambda: client.environments.migrate("fuse-x"),
        lambda: client.environments.rotate_token("fuse-x"),
        lambda: client.environments.computer("fuse-x", types.ComputerAction(action="screenshot")),
        lambda: client.environments.computer_display("fuse-x"),
        lambda: client.snapshots.create("fuse-x"),
        client.snapshots.list,
        lambda: client.snapshots.get("s"),
        lambda: client.snapshots.resolve("k", "amd64"),
        lambda: client.snapshots.restore("s"),
        lambda: client.snapshots.delete("s"),
        lambda: client.hosts.register(types.RegisterHostRequest(id="h", url="https://x")),
        lambda: client.hosts.cordon("h"),
        lambda: client.hosts.uncordon("h"),
        lambda: client.hosts.deregister("h"),
        client.api_keys.create,
        client.api_keys.list,
        lambda: client.api_keys.revoke("k"),
    ]
    for call in calls:
        with pytest.raises(errors.ApiError) as caught:
            call()
        assert (caught.value.status, caught.value.code) == (501, "unimplemented")


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


class SlowHost:
    """A fake host behind HTTP in a thread of its own, whose creates wait until they are let through."""

    def __init__(self) -> None:
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
        self._loop.call_soon_threadsafe(self.host.hold["create"].set)

    def _run(self) -> None:
        self.host.hold["create"] = asyncio.Event()
        app = fake_host_app(self.host)
        settings = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        self._server = HttpServer(settings)
        self._loop.run_until_complete(self._server.serve([self.listener]))
        self._loop.close()


def test_a_create_that_takes_too_long_is_still_an_environment(tmp_path: Path) -> None:
    """The usual loop of the contract's clients goes on: create answers with provisioning, events tell the rest."""
    with SlowHost() as slow:
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
