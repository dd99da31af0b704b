"""Options of the command line against the control plane itself, which pretends to have machines."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_outcome import Outcome

sys.path.insert(0, str(Path(__file__).parent.parent / "control"))

from control_process import Server, serving

from fusevm.cli import main
from fusevm.cli.env import create
from fusevm.cli.logs import logs

#: Value and exit code of each option: the stub is without region and labels, so that no host fits (5).
OPTIONS: dict[str, tuple[str | None, int]] = {
    "--task-id": ("named", 0),
    "--cpus": ("2", 0),
    "--ram": ("1G", 0),
    "--disk": ("8G", 0),
    "--region": ("north", 5),
    "--host": ("stub", 0),
    "--label": ("fast=yes", 5),
    "--max-runtime": ("30m", 0),
    "--idle-timeout": ("90s", 0),
    "--no-internet": (None, 0),
    "--allow": ("*.pypi.org:443,8000-8100", 0),
    "--deny": ("192.0.2.0/24", 0),
    "--publish": ("8080/udp", 0),
    "--no-wait": (None, 0),
    "--secret": ("A=b", 0),
    "--secret-file": ("{folder}/secrets", 0),
    "--file": ("{folder}/secrets:/etc/secrets", 0),
    "--startup-script": ("{folder}/script", 0),
    "--startup-timeout": ("1m", 0),
    "--manifest": ("{folder}/manifest", 0),
    "--agent": ("@{folder}/agent", 0),
    "--gateway-url": ("https://gateway.example", 0),
    "--gateway-token": ("t", 0),
    "--health-http": ("80/health", 0),
    "--seed": ("snap-none", 3),
    "--queue": ("1m", 0),
}
FILES = {
    "secrets": "A=b\n",
    "script": "true\n",
    "manifest": '{"version": "1"}',
    "agent": '{"command": ["/bin/true"]}',
}
GENERAL = {"--url", "--token", "--ca-file", "--debug", "--output", "--help"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


def options_of(command: click.Command) -> set[str]:
    named = [param.opts for param in command.params if isinstance(param, click.Option)]
    return {next(name for name in names if name.startswith("--")) for names in named} - GENERAL


def test_the_table_has_every_option() -> None:
    assert options_of(create) == OPTIONS.keys()
    assert options_of(logs) == {"--follow", "--source"}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_create_is_accepted_by_the_server(
    server: Server, environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, option: str
) -> None:
    environ.setenv("FUSE_BASE_URL", server.url)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    value, code = OPTIONS[option]
    words = ("env", "create", option, *([value.format(folder=tmp_path)] if value is not None else []))
    done = Outcome(main.run(words), *capfd.readouterr())
    assert done.code == code, done.err
    assert "not built yet" not in done.err


def test_what_a_host_does_not_say_is_unknown(
    server: Server, environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environ.setenv("FUSE_BASE_URL", server.url)
    done = Outcome(main.run(("version",)), *capfd.readouterr())
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert ["driver", "stub"] in lines
    assert ["VMM", "unknown"] in lines
