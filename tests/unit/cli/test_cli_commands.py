"""Commands against the fake API: what they print, where, and with which code they end."""

import base64
import json
import os
import re
import subprocess
import sys

import msgspec
import pytest
from cli_outcome import Fuse
from fake_api import CUT, FakeApi, make_environment, to_json

from fusevm import __version__
from fusevm.model import errors
from fusevm.wire.errors import ending_error
from fusevm.wire.rest import EventBody


def test_create_prints_the_id_and_nothing_else_on_stdout(fuse: Fuse, api: FakeApi) -> None:
    done = fuse("env", "create", "debian-12", "--task-id", "a", "--ram", "1G", "--disk", "8", "--max-runtime", "30m")
    assert (done.code, done.out) == (0, "fuse-a\n")
    assert msgspec.json.decode(api.requests[-1][3])["spec"] == {
        "image": "debian-12",
        "ram_mb": 1024,
        "storage_gb": 8,
        "max_runtime_seconds": 1800,
    }


def test_unlimited_runtime_is_said_in_words(fuse: Fuse, api: FakeApi) -> None:
    assert fuse("env", "create", "--max-runtime", "unlimited").code == 0
    assert msgspec.json.decode(api.requests[-1][3])["spec"]["max_runtime_seconds"] == "unlimited"
    refused = fuse("env", "create", "--max-runtime", "0")
    assert refused.code == 2
    assert "`unlimited`" in refused.err


def test_every_state_that_list_offers_can_match(fuse: Fuse, api: FakeApi) -> None:
    help_text = fuse("env", "list", "--help").out
    offered = re.search(r"--state \[([a-z|]+)\]", help_text)
    assert offered
    for state in offered[1].split("|"):
        api.reset(api.disk)
        if state in ("destroyed", "failed"):
            api.ended["x"] = make_environment("a", state)
        else:
            api.add("a", state)
        assert [one["state"] for one in json.loads(fuse("env", "list", "--state", state, "-o", "json").out)] == [state]


def test_list_is_plain_columns_in_a_pipe(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    api.add("longer-name", "draining")
    lines = fuse("env", "list").out.splitlines()
    assert lines[0].split() == ["ID", "STATE", "IMAGE", "CPUS", "RAM", "DISK", "HOST", "AGE"]
    assert lines[1].startswith("fuse-a            running   debian-12")
    assert "\x1b" not in "".join(lines)
    assert fuse("env", "list", "-q").out == "fuse-a\nfuse-longer-name\n"


def test_get_shows_one_environment(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    text = fuse("env", "get", "a").out
    assert "1 vCPU, 512 MiB memory, 4 GiB disk" in text
    assert "boot 3 ms" in text
    assert json.loads(fuse("env", "get", "fuse-a", "-o", "json").out)["id"] == "fuse-a"


def test_rm_goes_on_after_a_failure_and_ends_with_its_code(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    api.add("b")
    done = fuse("env", "rm", "a", "nope", "b")
    assert (done.code, done.out) == (3, "fuse-a\nfuse-b\n")
    assert "fuse: fuse-nope: There is no environment" in done.err
    assert not api.environments


def test_rm_all_and_json(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    assert json.loads(fuse("env", "rm", "--all", "-o", "json").out) == [{"id": "fuse-a", "removed": True}]
    assert fuse("env", "rm").code == 2
    assert fuse("env", "rm", "--all", "a").code == 2


def test_drain(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    assert fuse("env", "drain", "a").out == "fuse-a is draining\n"


def test_events_are_lines(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    api.events = [
        EventBody(event="state", vm_id="fuse-a", uid="u", state="running", updated_at="T1"),
        EventBody(id="u.2", event="state", vm_id="fuse-a", uid="u", state="destroyed", reason="idle", updated_at="T2"),
    ]
    assert fuse("env", "events", "a").out.splitlines()[1].split() == ["T2", "fuse-a", "destroyed", "(idle)"]
    lines = fuse("env", "events", "a", "-o", "json").out.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["running", "destroyed"]


def test_story_tells_the_events(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    api.events = [
        EventBody(event="state", vm_id="fuse-a", uid="u", state="running", cause="request r", updated_at="T1")
    ]
    text = fuse("story", "a").out
    assert "T1  the machine came up [request r]" in text
    assert api.requests[-1][2]["last-event-id"] == "01uida.0"
    assert "no longer kept" not in text


def test_story_says_that_its_beginning_is_not_kept(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    for seq, is_whole in ((1, True), (7, False)):
        first = EventBody(
            id=f"01uida.{seq}", event="state", vm_id="fuse-a", uid="01uida", state="running", updated_at="T1"
        )
        api.events = [first]
        assert ("What happened before is no longer kept." not in fuse("story", "a").out) is is_whole


def test_logs_are_raw(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    assert fuse("logs", "a").out == "line one\nline two\n"


def test_hosts(fuse: Fuse) -> None:
    assert "default  active  ok      qemu" in fuse("host", "list").out
    assert json.loads(fuse("host", "get", "default", "-o", "json").out)["driver"] == "qemu"
    assert fuse("host", "get", "nope").code == 3


def test_version_names_everything_that_takes_part(fuse: Fuse, api: FakeApi) -> None:
    versions = {"version": "1.2.3", "vmm_version": "7.2.22", "agent_version": "a1b2c3", "kernel": "6.12.1-cloud"}
    api.hosts = [msgspec.structs.replace(api.hosts[0], driver="qemu (tcg)", **versions)]
    text = fuse("version").out
    assert f"client          {__version__}\n" in text
    assert "9.9.9 (fuse-orchestrator at" in text
    for value in ("qemu (tcg)", *versions.values()):
        assert value in text
    assert json.loads(fuse("version", "-o", "json").out)["hosts"] == [
        {"id": "default", "driver": "qemu (tcg)"} | versions
    ]
    shown = fuse("host", "get", "default").out
    for value in versions.values():
        assert value in shown


def test_version_says_that_no_server_answers(fuse: Fuse, environ: pytest.MonkeyPatch) -> None:
    environ.setenv("FUSE_BASE_URL", "http://127.0.0.1:9")
    done = fuse("version")
    assert (done.code, done.out) == (5, f"client  {__version__}\n")
    assert done.err.startswith("fuse: Nothing answers")
    assert json.loads(fuse("version", "-o", "json").out) == {"client": __version__}


# -- running commands ------------------------------------------------------------------------------------------------


def test_exec_has_the_commands_streams_and_exit_code(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    done = fuse("exec", "-n", "a", "--", "sh", "-c", "echo out; echo err >&2; exit 37")
    assert done == (37, "out\n", "err\n")


def test_exec_passes_its_options_on(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    done = fuse("exec", "-n", "-u", "1000", "-w", "/", "-e", "K=v=w", "--timeout", "1m", "a", "printenv", "K")
    assert (done.code, done.out) == (0, "v=w\n")
    sent = api.commands[-1]
    assert (sent.user, sent.cwd, sent.timeout_ms, sent.tty) == ("1000", "/", 60_000, False)


def test_exec_json_is_one_document(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    done = fuse("exec", "-n", "-o", "json", "a", "--", "sh", "-c", "printf 'a\\377'; exit 3")
    assert done.code == 3
    answer = json.loads(done.out)
    assert answer["exit_code"] == 3
    assert base64.b64decode(answer["stdout_b64"]) == b"a\xff"
    assert answer["stderr"] == ""


def test_exec_of_nothing_is_wrong_usage(fuse: Fuse) -> None:
    assert fuse("exec", "a").code == 2
    assert fuse("exec", "a", "-c", "x", "--", "y").code == 2
    assert fuse("exec", "-e", "novalue", "a", "true").code == 2


def test_exec_of_a_command_that_does_not_exist(fuse: Fuse, api: FakeApi) -> None:
    api.add("a")
    done = fuse("exec", "-n", "a", "/no/such")
    assert done.code == 2
    assert "does not exist in the machine" in done.err


def test_run_destroys_the_machine_whatever_the_command_says(fuse: Fuse, api: FakeApi) -> None:
    done = fuse("run", "-n", "debian-12", "--", "sh", "-c", "echo hi; exit 9")
    assert (done.code, done.out) == (9, "hi\n")
    assert not api.environments
    assert len(api.ended) == 1


def test_run_destroys_the_machine_when_the_command_cannot_start(fuse: Fuse, api: FakeApi) -> None:
    assert fuse("run", "-n", "debian-12", "--", "/no/such").code == 2
    assert not api.environments


def test_run_without_a_command_runs_the_images_own(fuse: Fuse, api: FakeApi) -> None:
    api.image_command = ["sh", "-c", "echo of the image; exit 7"]
    done = fuse("run", "-n", "tool:1")
    assert (done.code, done.out) == (7, "of the image\n")
    assert not api.environments
    # A command that is given is run alone, without the image's entrypoint.
    assert fuse("run", "-n", "tool:1", "--", "echo", "mine").out == "mine\n"
    assert [command.image_command for command in api.commands] == [True, False]


def test_run_without_any_command_and_terminal_asks_for_one(fuse: Fuse, api: FakeApi) -> None:
    done = fuse("run", "-n", "debian-12")
    assert done.code == 2
    assert "debian-12 has no command of its own: fuse run debian-12 -- COMMAND" in done.err
    assert not api.environments


def test_run_keeps_the_machine_when_asked(fuse: Fuse, api: FakeApi) -> None:
    done = fuse("run", "--keep", "--task-id", "k", "-n", "debian-12", "true")
    assert done.code == 0
    assert list(api.environments) == ["fuse-k"]
    assert "`fuse env rm fuse-k` ends it" in done.err


def test_run_never_destroys_what_was_there_before(fuse: Fuse, api: FakeApi) -> None:
    api.add("mine")
    assert fuse("run", "--task-id", "mine", "-n", "debian-12", "true").code == 4
    assert list(api.environments) == ["fuse-mine"]


@pytest.mark.parametrize(
    ("reason", "code"), [("boot_failed", 5), ("startup_failed", 2), ("boot_timeout", 7), ("deleted", 3)]
)
def test_a_machine_that_did_not_come_up_is_told_and_ends_by_itself(
    fuse: Fuse, api: FakeApi, reason: str, code: int
) -> None:
    why = ending_error("fuse-x", "01x", state="failed", reason=reason, message="no init")
    api.script("POST", "/v1/environments", why)
    done = fuse("run", "-n", "debian-12", "true")
    assert done.code == code
    assert "no init" in done.err
    assert "`fuse env events fuse-x --uid 01x`" in done.err
    assert [method for method, *_ in api.requests] == ["POST"]


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadField(field="cpus", problem="too many"), 2),
        (errors.EnvironmentNotFound(id="x"), 3),
        (errors.TaskExists(id="x", state="running"), 4),
        (errors.NoCapacity(rejections="1 full"), 5),
        (errors.Unauthorized(problem="The token is wrong"), 6),
        (errors.Forbidden(problem="no"), 6),
        (errors.Timeout(what="x", limit_s=1), 7),
        (errors.Unimplemented(feature="x", why="y"), 1),
        (errors.Internal(problem="oops"), 1),
    ],
)
def test_exit_codes_mean_something(fuse: Fuse, api: FakeApi, error: errors.Error, code: int) -> None:
    api.script("POST", "/v1/environments", error)
    done = fuse("env", "create")
    assert done.code == code
    assert done.err.startswith(f"fuse: {error.message}")
    assert "Traceback" not in done.err


def test_errors_for_programs_are_json_on_stderr(fuse: Fuse, api: FakeApi) -> None:
    done = fuse("env", "get", "nope", "-o", "json")
    assert done.out == ""
    told = json.loads(done.err)["error"]
    assert (told["code"], told["details"]["reason"], told["exit_code"]) == ("not_found", "environment_not_found", 3)


def test_internal_errors_name_the_request(fuse: Fuse, api: FakeApi) -> None:
    api.script("GET", "/v1/environments", errors.Internal(problem="oops"))
    assert "req_test" in fuse("env", "list").err


def test_nobody_listening_says_what_to_do(fuse: Fuse, environ: pytest.MonkeyPatch) -> None:
    environ.setenv("FUSE_BASE_URL", "http://127.0.0.1:9")
    done = fuse("env", "list")
    assert done.code == 5
    assert "`fuse up`" in done.err


def test_a_wrong_token_says_what_to_do(fuse: Fuse) -> None:
    done = fuse("env", "list", "--token", "wrong")
    assert done.code == 6
    assert "FUSE_TOKEN" in done.err


def test_debug_shows_the_traceback(fuse: Fuse) -> None:
    assert "Traceback" in fuse("--debug", "env", "get", "nope").err
    assert "Traceback" in fuse("env", "get", "nope", "--debug").err


def test_a_bug_is_one_line(fuse: Fuse, environ: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("boom")

    environ.setattr("fusevm.cli.lazy.importlib.import_module", lambda name: broken())
    done = fuse("version")
    assert done.code == 1
    assert done.err.startswith("fuse: internal error: ZeroDivisionError: boom")
    assert "Traceback" not in done.err


def test_unknown_commands_are_wrong_usage(fuse: Fuse) -> None:
    assert fuse("frobnicate").code == 2
    assert fuse("env", "list", "--frob").code == 2


def test_help_loads_no_command(fuse: Fuse) -> None:
    for name in ("fusevm.cli.transfer", "fusevm.cli.installation", "fusevm.cli.building"):
        sys.modules.pop(name, None)
    assert fuse("--help").code == 0
    assert "fusevm.cli.installation" not in sys.modules


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(fuse: Fuse, shell: str) -> None:
    assert "_FUSE_COMPLETE" in fuse("completion", shell).out


def test_environment_ids_are_completed(
    fuse: Fuse, api: FakeApi, environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    api.add("one")
    api.add("two")
    environ.setenv("COMP_WORDS", "fuse env get fuse-t")
    environ.setenv("COMP_CWORD", "3")
    environ.setenv("_FUSE_COMPLETE", "bash_complete")
    with pytest.raises(SystemExit):
        fuse()
    assert capfd.readouterr().out == "plain,fuse-two\n"


def test_completion_is_silent_when_nobody_answers(
    fuse: Fuse, environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environ.setenv("FUSE_BASE_URL", "http://127.0.0.1:9")
    environ.setenv("COMP_WORDS", "fuse env get ")
    environ.setenv("COMP_CWORD", "3")
    environ.setenv("_FUSE_COMPLETE", "bash_complete")
    with pytest.raises(SystemExit):
        fuse()
    out, err = capfd.readouterr()
    assert (out.strip(), err) == ("", "")


def test_a_lost_create_is_repeated_under_one_key(fuse: Fuse, api: FakeApi) -> None:
    api.script("POST", "/v1/environments", lambda: CUT)
    assert fuse("env", "create", "--task-id", "a").code == 0
    assert len({headers["idempotency-key"] for _, _, headers, _ in api.requests}) == 1


def test_a_machine_that_never_comes_up_is_a_boot_failure(fuse: Fuse, api: FakeApi) -> None:
    early = make_environment("bad", "provisioning")
    api.script("POST", "/v1/environments", lambda: to_json(early, 201))
    api.ended[early.uid] = make_environment("bad", "failed", reason="boot_failed", error="no root")
    done = fuse("env", "create", "--task-id", "bad")
    assert done.code == 5
    assert "no root" in done.err


@pytest.mark.parametrize(
    "line",
    [
        ["exec", "a", "--", "echo", "x"],
        ["exec", "-n", "a", "echo", "x"],
        ["exec", "a", "-n", "--", "echo", "x"],
        ["exec", "a", "-e", "K=V", "--", "echo", "x"],
        ["exec", "-n", "a", "--", "echo", "--", "x"],
        ["exec", "-n", "a", "echo", "-n", "--", "x"],
    ],
)
def test_our_options_end_where_the_command_begins(fuse: Fuse, api: FakeApi, line: list[str]) -> None:
    api.add("a")
    assert fuse(*line).code == 0
    assert api.commands[-1].cmd == line[line.index("echo") :]


@pytest.mark.parametrize(
    "line", [["exec", "a", "--frob", "--", "x"], ["exec", "a", "--frob", "x"], ["exec", "--frob", "a"]]
)
def test_unknown_options_before_the_command_are_wrong_usage(fuse: Fuse, api: FakeApi, line: list[str]) -> None:
    api.add("a")
    done = fuse(*line)
    assert done.code == 2
    assert "--frob" in done.err


HEAVY = (
    "asyncio",
    "websockets",
    "rich",
    "starlette",
    "uvicorn",
    "structlog",
    "fusevm.host",
    "fusevm.control",
    "tomllib",
)


@pytest.mark.parametrize(
    "line", [["env", "list"], ["env", "get", "a"], ["env", "rm", "a"], ["host", "list"], ["--help"]]
)
def test_small_commands_load_little(api: FakeApi, line: list[str]) -> None:
    """What keeps `fuse env list` within its 200 ms."""
    api.add("a")
    code = "import sys; from fusevm.cli.main import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    environ = os.environ | {"FUSE_BASE_URL": api.url, "FUSE_TOKEN": api.token}
    command = [sys.executable, "-c", code, *line]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    loaded = done.stderr.split()
    assert "fusevm.cli.main" in loaded
    assert [name for name in HEAVY if name in loaded] == []
