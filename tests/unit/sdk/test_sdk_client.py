"""The synchronous client against a real server on loopback."""

import threading
from collections.abc import Iterator

import msgspec
import pytest
from fake_api import CUT, TOKEN, FakeApi, make_environment, to_json

from fusevm.model.errors import (
    BootFailed,
    CommandNotFound,
    EnvironmentEnded,
    EnvironmentNotFound,
    Error,
    FileNotFound,
    IdempotencyInProgress,
    NoCapacity,
    ShuttingDown,
    StartupFailed,
    TaskExists,
    Unauthorized,
)
from fusevm.sdk import Fuse
from fusevm.sdk.core import output_of
from fusevm.sdk.failures import ConnectionLost, ServerUnreachable
from fusevm.wire.frames import FrameType
from fusevm.wire.rest import EventBody


@pytest.fixture
def fuse(api: FakeApi) -> Iterator[Fuse]:
    with Fuse(api.url, TOKEN) as client:
        yield client


def test_create_returns_the_running_environment(api: FakeApi, fuse: Fuse) -> None:
    env = fuse.environments.create("build", image="debian-12", ram_mb=256, internet=False, files={"/a": b"\x00"})

    assert (env.id, env.state) == ("fuse-build", "running")
    _, _, headers, body = api.requests[-1]
    assert msgspec.json.decode(body) == {
        "task_id": "build",
        "spec": {"image": "debian-12", "ram_mb": 256},
        "network": {"internet": False},
        "files": {"/a": "AA=="},
    }
    assert len(headers["idempotency-key"]) == 32
    assert headers["authorization"] == f"Bearer {TOKEN}"


def test_create_waits_when_the_server_answers_before_the_machine_runs(api: FakeApi, fuse: Fuse) -> None:
    early = make_environment("slow", "provisioning")
    api.script("POST", "/v1/environments", lambda: to_json(early, 201))
    api.add("slow")

    assert fuse.environments.create("slow").state == "running"


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("boot_failed", BootFailed),
        ("startup_failed", StartupFailed),
        ("deleted", EnvironmentEnded),
        ("x", EnvironmentEnded),
    ],
)
def test_create_of_what_ends_instead_of_coming_up_raises_why(
    api: FakeApi, fuse: Fuse, reason: str, error: type[Error]
) -> None:
    early = make_environment("bad", "provisioning")
    api.script("POST", "/v1/environments", lambda: to_json(early, 201))
    api.ended[early.uid] = make_environment("bad", "failed", reason=reason, error="no init")

    with pytest.raises(error, match="no init") as caught:
        fuse.environments.create("bad")
    details = caught.value.details
    assert (details["id"], details["uid"], details["reason"]) == (early.id, early.uid, error.reason)
    assert details["record"] == f"/v1/environments/{early.id}?uid={early.uid}"


def test_create_is_repeated_with_the_same_key_when_the_answer_is_lost(api: FakeApi, fuse: Fuse) -> None:
    api.script("POST", "/v1/environments", lambda: CUT)

    assert fuse.environments.create("again").state == "running"
    keys = [headers["idempotency-key"] for _, _, headers, _ in api.requests]
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_create_asks_again_while_the_first_try_is_under_way(api: FakeApi, fuse: Fuse) -> None:
    api.script("POST", "/v1/environments", IdempotencyInProgress(key="k"))

    assert fuse.environments.create("again").state == "running"


def test_exec_is_not_repeated_when_the_answer_is_lost(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    api.script("POST", "/v1/environments/fuse-a", lambda: CUT)

    with pytest.raises(ConnectionLost):
        fuse.environments.exec("fuse-a", ["true"])
    assert len(api.requests) == 1


def test_calls_are_repeated_while_the_server_shuts_down(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    api.script("POST", "/v1/environments/fuse-a", ShuttingDown())

    assert fuse.environments.exec("fuse-a", ["true"]).exit_code == 0


def test_delete_whose_answer_was_lost_succeeds_on_not_found(api: FakeApi, fuse: Fuse) -> None:
    api.script("DELETE", "/v1/environments/fuse-a", lambda: CUT)

    fuse.environments.delete("fuse-a")
    assert [method for method, *_ in api.requests] == ["DELETE", "DELETE"]


def test_delete_of_nothing_is_not_found(fuse: Fuse) -> None:
    with pytest.raises(EnvironmentNotFound):
        fuse.environments.delete("fuse-never")


def test_delete_waits_until_the_environment_is_gone(api: FakeApi, fuse: Fuse) -> None:
    env = api.add("a", "destroying")
    api.script("DELETE", "/v1/environments/fuse-a", lambda: to_json(env, 202))
    threading.Timer(0.2, lambda: api.environments.pop("fuse-a")).start()

    fuse.environments.delete("fuse-a")
    assert "fuse-a" not in api.environments


def test_errors_are_the_models_classes_and_name_the_request(api: FakeApi, fuse: Fuse) -> None:
    api.script("POST", "/v1/environments", NoCapacity(rejections="2 full"))

    with pytest.raises(NoCapacity) as caught:
        fuse.environments.create("x")
    assert caught.value.rejections == "2 full"
    assert "req_test" in caught.value.__notes__[0]


def test_a_second_live_task_is_a_conflict(fuse: Fuse) -> None:
    fuse.environments.create("one")
    with pytest.raises(TaskExists):
        fuse.environments.create("one")


def test_a_wrong_token_is_unauthorized(api: FakeApi) -> None:
    with Fuse(api.url, "wrong") as fuse, pytest.raises(Unauthorized):
        next(fuse.environments.list())


def test_nobody_listening_is_server_unreachable() -> None:
    with Fuse("http://127.0.0.1:9") as fuse, pytest.raises(ServerUnreachable, match="connection refused"):
        fuse.version()


def test_list_follows_the_pages(api: FakeApi, fuse: Fuse) -> None:
    for number in range(450):
        api.add(f"t{number:03}")

    assert len(list(fuse.environments.list())) == 450
    assert len(api.requests) == 3


def test_one_connection_serves_many_calls(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    for _ in range(5):
        fuse.environments.get("fuse-a")
        fuse.version()
    ports = {headers.get("host") for _, _, headers, _ in api.requests}
    assert ports == {f"127.0.0.1:{api.port}"}
    assert len(fuse._channel._transport._idle) == 1


def test_a_connection_that_the_server_closed_is_not_used_again(own_api: FakeApi) -> None:
    own_api.add("a")
    with Fuse(own_api.url, TOKEN) as fuse:
        fuse.environments.get("fuse-a")
        own_api.stop()
        own_api.start()
        assert fuse.environments.exec("fuse-a", ["true"]).exit_code == 0  # never repeated: the pool noticed


def test_exec_gives_output_without_loss(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    answer = fuse.environments.exec("fuse-a", shell="cat; echo err >&2; exit 3", stdin=b"\xff\x00", binary=True)

    assert answer.exit_code == 3
    assert output_of(answer) == (b"\xff\x00", b"err\n")


def test_files_round_trip(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    files = fuse.environments.files("fuse-a")
    data = bytes(range(256)) * 5000

    written = files.write("/dir/x.bin", (data[i : i + 70_000] for i in range(0, len(data), 70_000)), mode="0600")
    assert written.size_bytes == len(data)
    assert files.read("/dir/x.bin") == data
    assert files.stat("/dir/x.bin").mode == "0600"
    assert [entry.name for entry in files.list("/dir")] == ["x.bin"]
    files.move("/dir/x.bin", "/dir/y.bin")
    files.remove("/dir/y.bin")
    with pytest.raises(FileNotFound):
        files.stat("/dir/y.bin")


def test_an_upload_that_is_refused_early_gives_the_servers_error(api: FakeApi, fuse: Fuse) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2000):
            yield bytes(100_000)

    with pytest.raises(EnvironmentNotFound):
        fuse.environments.files("fuse-none").write("/x", endless())


def test_events_are_typed_and_end_with_the_stream(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    api.events = [
        EventBody(event="state", vm_id="fuse-a", uid="u", state="running", updated_at="t"),
        EventBody(id="7", event="state", vm_id="fuse-a", uid="u", state="destroyed", updated_at="t"),
    ]
    assert [event.id for event in fuse.environments.events("fuse-a", last_event_id="5")] == ["", "7"]
    assert api.requests[-1][2]["last-event-id"] == "5"


def test_logs_come_as_bytes(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    assert b"".join(fuse.environments.logs("fuse-a", source="agent")) == api.log
    assert "source=agent" in api.requests[-1][1]


def test_a_session_streams_both_outputs_and_the_exit_code(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    with fuse.environments.exec_stream("fuse-a", shell="read x; echo out $x; echo err >&2; exit 5") as session:
        session.send_stdin(b"hello\n")
        frames = list(session.frames())

    assert b"".join(f.payload for f in frames if f.type is FrameType.STDOUT) == b"out hello\n"
    assert b"".join(f.payload for f in frames if f.type is FrameType.STDERR) == b"err\n"
    assert session.exit is not None
    assert session.exit.exit_code == 5
    assert session.pid


def test_a_session_echoes_more_than_all_buffers_hold(api: FakeApi, fuse: Fuse) -> None:
    """The threaded client of `websockets` stalls here: it cannot receive while it sends."""
    api.add("a")
    data = bytes(range(256)) * 4096 * 16  # 16 MiB

    def feed() -> None:
        session.send_stdin(data)
        session.close_stdin()

    with fuse.environments.exec_stream("fuse-a", ["cat"]) as session:
        feeder = threading.Thread(target=feed)
        feeder.start()
        echoed = b"".join(frame.payload for frame in session.frames())
        feeder.join()
    assert echoed == data


def test_a_command_that_does_not_exist_raises_in_the_session(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    with fuse.environments.exec_stream("fuse-a", ["/no/such"]) as session, pytest.raises(CommandNotFound):
        session.wait()


def test_a_refused_session_raises_the_servers_error(fuse: Fuse) -> None:
    with pytest.raises(EnvironmentNotFound):
        fuse.environments.shell("fuse-none")


def test_a_shell_has_a_terminal_of_the_given_size(api: FakeApi, fuse: Fuse) -> None:
    api.add("a")
    with fuse.environments.shell("fuse-a", ["sh", "-c", "stty size; read x; stty size"], rows=7, cols=33) as session:
        frames = session.frames()
        assert next(frames).payload == b"7 33\r\n"
        session.resize(9, 44)
        session.send_stdin(b"\n")
        assert b"9 44" in b"".join(frame.payload for frame in frames)


def test_a_session_is_lost_with_its_server(own_api: FakeApi) -> None:
    own_api.add("a")
    with Fuse(own_api.url, TOKEN) as fuse, fuse.environments.exec_stream("fuse-a", ["sleep", "60"]) as session:
        threading.Timer(0.1, own_api.stop).start()
        with pytest.raises(ConnectionLost):
            session.wait()
