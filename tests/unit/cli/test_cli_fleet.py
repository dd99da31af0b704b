"""Commands about snapshots, hosts, keys and what environments bring along, against a real control plane with its stub
host."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_outcome import Fuse, Outcome

sys.path.insert(0, str(Path(__file__).parent.parent / "control"))

from control_process import Server, serving

from fusevm.cli import main

TOKEN = "master-token-of-this-test"
Data = Callable[..., Any]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("plane"), "--auth-token", TOKEN, "--allow-local-hosts") as server:
        yield server
        assert server.end() == 0


@pytest.fixture
def run(plane: Server, environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fuse:
    environ.setenv("FUSE_BASE_URL", plane.url)
    environ.setenv("FUSE_TOKEN", TOKEN)

    def call(*arguments: str) -> Outcome:
        capfd.readouterr()
        code = main.run(arguments)
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def data(run: Fuse) -> Data:
    """The JSON that a command prints, which must succeed."""

    def call(*arguments: str) -> Any:
        done = run(*arguments, "-o", "json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return call


@pytest.fixture
def env(run: Fuse) -> Iterator[str]:
    """A running environment that brings nothing."""
    yield from _environment(run)


def _environment(run: Fuse, *options: str) -> Iterator[str]:
    done = run("env", "create", *options)
    assert done.code == 0, done.err
    yield done.out.strip()
    run("env", "rm", done.out.strip())


# -- environments --------------------------------------------------------------------------------------------------


def test_an_environment_brings_everything_along(run: Fuse, data: Data, tmp_path: Path) -> None:
    script = tmp_path / "start.sh"
    script.write_text("echo ready\n")
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o750)
    secrets = tmp_path / "secrets"
    secrets.write_text("# comment\nA=1\nB=two=2\n")
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"version": "1", "env": {"X": {"secret": "C"}}}')
    agent = tmp_path / "agent.json"
    agent.write_text('{"command": ["/opt/tool", "--serve"], "port": 80}')
    options = ["--startup-script", str(script), "--file", f"{tool}:/opt/tool", "--secret-file", str(secrets)]
    options += ["--secret", "C=3", "--manifest", str(manifest), "--agent", f"@{agent}", "--startup-timeout", "1m"]
    options += ["--gateway-url", "https://gateway.example", "--gateway-token", "t", "--health-http", "80/health"]
    with contextlib.contextmanager(_environment)(run, "--task-id", "full", *options, "--queue", "5m") as name:
        one = until(lambda: data("env", "get", name), lambda seen: {"agent", "health"} <= seen.keys())
        assert (one["state"], one["agent"]["state"], one["health"]["state"]) == ("running", "running", "passing")
        shown = run("env", "get", name).out
        assert "daemon" in shown
        assert "setup" in shown
        assert run("logs", name, "--source", "startup").out == "stub host: echo ready\n\n"
        assert run("logs", name, "--source", "agent", "-f").out == "stub host: /opt/tool --serve\n"
        assert run("env", "rotate-token", name).out == f"{name}\n"
        assert data("env", "rotate-token", name) == {"id": name, "rotated": True}
        assert run("env", "drain", name).out == f"{name} is draining\n"
        assert data("env", "get", name)["agent"]["state"] == "drained"


def until(look: Callable[[], Any], is_so: Callable[[Any], bool]) -> Any:
    """Look again and again, for a minute."""
    ends_at = time.monotonic() + 60
    while not is_so(seen := look()):
        assert time.monotonic() < ends_at, seen
        time.sleep(0.1)
    return seen


def test_an_environment_without_a_log_says_so(run: Fuse, env: str) -> None:
    done = run("logs", env, "--source", "agent")
    assert (done.code, done.out) == (3, "")
    assert "without a daemon" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--secret", "A"], "--secret takes KEY=VALUE"),
        (["--file", "x"], "--file takes LOCAL:/REMOTE"),
        (["--file", "/no/such/file:/x"], "--file /no/such/file: No such file"),
        (["--file", "x:relative"], "LOCAL:/REMOTE"),
        (["--agent", "@/no/such/file"], "No such file"),
        (["--agent", "nobody"], "nobody"),
        (["--health-http", "http"], "PORT"),
        (["--health-http", "70000"], "PORT"),
        (["--queue", "soon"], "no duration"),
    ],
)
def test_what_can_never_work_is_wrong_usage(run: Fuse, options: list[str], words: str) -> None:
    done = run("env", "create", *options)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("--secret-file", '{"A": 1}', "every value must be text"),
        ("--secret-file", "{", "no JSON"),
        ("--secret-file", "A", "KEY=VALUE"),
        ("--agent", "[]", "a JSON object is needed"),
        ("--agent", "{", "no JSON"),
    ],
)
def test_files_that_cannot_be_read_are_named(run: Fuse, tmp_path: Path, option: str, text: str, words: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    done = run("env", "create", option, f"@{path}" if option == "--agent" else str(path))
    assert (done.code, done.out) == (2, "")
    assert words in done.err


# -- snapshots -----------------------------------------------------------------------------------------------------


def test_the_life_of_a_snapshot(run: Fuse, data: Data, env: str) -> None:
    done = run("snapshot", "create", env, "--name", "base", "--comment", "before", "--metadata", "a=b")
    assert done.code == 0, done.err
    (first,) = done.out.split()
    second = data("snapshot", "create", env, "--retention", "1h", "--no-wait")["id"]
    listed = run("snapshot", "list", "--env", env).out.splitlines()
    assert listed[0].split() == ["ID", "STATE", "ENV", "NAME", "KIND", "SIZE", "HOST", "AGE"]
    assert [line.split()[0] for line in listed[1:]] == [second, first]
    assert run("snapshot", "list", "-q", "--name", "base").out == f"{first}\n"
    shown = run("snapshot", "get", first).out
    for word in ("before", "base", "a=b", env, "ready"):
        assert word in shown
    assert data("snapshot", "get", first)["metadata"] == {"a": "b", "name": "base"}
    assert run("snapshot", "restore", first).out == f"{first}\n"
    assert data("snapshot", "restore", first)["state"] == "ready"
    with contextlib.contextmanager(_environment)(run, "--seed", first) as seeded:
        assert data("env", "get", seeded)["spec"]["seed_snapshot_id"] == first
    removed = run("snapshot", "rm", first, "snap-nope", second)
    assert (removed.code, removed.out.split()) == (3, [first, second])
    assert "fuse: snap-nope: " in removed.err
    assert data("snapshot", "list", "--env", env) == []


def test_a_snapshot_that_is_not_there_is_a_3(run: Fuse) -> None:
    done = run("snapshot", "get", "snap-nope")
    assert (done.code, done.out) == (3, "")
    assert "snap-nope" in done.err


# -- hosts ---------------------------------------------------------------------------------------------------------


def test_a_host_is_registered_cordoned_drained_and_removed(run: Fuse, data: Data) -> None:
    sizes = ["--cpus", "4", "--ram", "4G", "--disk", "100", "--max-machines", "9"]
    done = run("host", "register", "h9", "http://127.0.0.1:9", "--region", "north", "--label", "a=b", *sizes)
    assert (done.code, done.out) == (0, "h9\n")
    assert "warning: the host does not answer" in done.err
    one = data("host", "get", "h9")
    assert one["capacity"].items() >= {"cpus": 4, "ram_mb": 4096, "storage_gb": 100, "vm_count": 9}.items()
    assert (one["region"], one["labels"]) == ("north", {"a": "b"})
    assert run("host", "cordon", "h9").out == "h9 is cordoned\n"
    assert run("host", "uncordon", "h9").out == "h9 is active\n"
    assert data("host", "drain", "h9")["state"] == "draining"
    assert data("host", "rm", "h9") == [{"id": "h9", "removed": True}]
    assert run("host", "cordon", "h9").code == 3
    # The stub host was cordoned, since a real one had come.
    assert run("host", "uncordon", "stub").out == "stub is active\n"


def test_a_registration_that_cannot_work_says_why(run: Fuse) -> None:
    silent = run("host", "register", "h9", "http://127.0.0.1:9")
    assert (silent.code, silent.out) == (5, "")
    plain = run("host", "register", "h9", "http://10.1.2.3:8090")
    assert plain.code == 2
    assert "https" in plain.err


def test_a_host_with_environments_is_not_removed(run: Fuse, env: str) -> None:
    done = run("host", "rm", "stub", "--force")
    assert (done.code, done.out) == (4, "")
    assert "environments" in done.err


# -- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_is_made_used_listed_and_revoked(run: Fuse, data: Data) -> None:
    done = run("key", "create", "CI", "--tenant", "acme", "--scope", "environments:read", "--expires", "1d")
    assert done.code == 0, done.err
    text = done.out.strip()
    assert text.startswith("fuse_sk_")
    (one,) = [one for one in data("key", "list") if one["label"] == "CI"]
    assert (one["tenant"], one["scopes"]) == ("acme", ["environments:read"])
    assert one["id"] in done.err
    assert text not in json.dumps(one)
    assert one["id"] in run("key", "list").out
    assert json.loads(run("--token", text, "env", "list", "-o", "json").out) == []
    assert run("--token", text, "env", "create").code == 6
    assert run("--token", text, "key", "list").code == 6
    assert run("key", "revoke", one["id"]).out == f"{one['id']}\n"
    assert run("--token", text, "env", "list").code == 6
    assert one["id"] not in run("key", "list").out
    assert one["id"] in run("key", "list", "--all").out


def test_a_scope_that_does_not_exist_is_wrong_usage(run: Fuse) -> None:
    done = run("key", "create", "--scope", "everything")
    assert done.code == 2
    assert "environments:read" in done.err


# -- completion ----------------------------------------------------------------------------------------------------


def test_ids_are_completed(
    run: Fuse, data: Data, env: str, environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    taken = data("snapshot", "create", env)["id"]

    def complete(*words: str) -> str:
        environ.setenv("_FUSE_COMPLETE", "bash_complete")
        environ.setenv("COMP_WORDS", " ".join(("fuse", *words)))
        environ.setenv("COMP_CWORD", str(len(words)))
        with pytest.raises(SystemExit):
            main.run(())
        environ.delenv("_FUSE_COMPLETE")
        return capfd.readouterr().out

    assert taken in complete("snapshot", "get", "snap-")
    assert "stub" in complete("host", "cordon", "st")
    assert complete("host", "cordon", "zz").strip() == ""
