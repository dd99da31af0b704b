"""Options that say what an environment brings into its machine: files, secrets, a script, a daemon, a health check."""

import json
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusevm.cli.options import Duration, variables

if TYPE_CHECKING:
    from fusevm.sdk.core import CreateFields

#: Names of the arguments that `bringing_options` adds.
BRINGING = (
    "secrets",
    "secret_file",
    "files",
    "startup_script",
    "startup_timeout",
    "manifest",
    "agent",
    "gateway_url",
    "gateway_token",
    "health_http",
    "seed",
    "queue",
)


def bringing_options(function: Any) -> Any:
    """Add them to a command; `brought_fields` reads what they said."""
    options = (
        click.option("--secret", "secrets", multiple=True, metavar="K=V", help="Secret in /fuse. Repeatable."),
        click.option(
            "--secret-file",
            type=click.File("r"),
            metavar="FILE",
            help="Secrets as JSON object or KEY=VALUE lines; - is stdin.",
        ),
        click.option(
            "--file",
            "files",
            multiple=True,
            metavar="LOCAL:REMOTE",
            help="File to put there, with its mode. Repeatable; at most 512 KiB in all.",
        ),
        click.option(
            "--startup-script",
            type=click.File("r"),
            metavar="FILE",
            help="Script that root runs before the environment is running; - is stdin.",
        ),
        click.option("--startup-timeout", type=Duration(minimum_s=1), metavar="TIME", help="Its limit. Default 30s."),
        click.option("--manifest", type=click.File("rb"), metavar="FILE", help="Manifest (JSON, version 1)."),
        click.option(
            "--agent", metavar="NAME|@FILE", help="Daemon: a profile of the server, or a JSON file that describes one."
        ),
        click.option("--gateway-url", metavar="URL", help="Told to the daemon."),
        click.option("--gateway-token", metavar="TOKEN", help="Told to the daemon."),
        click.option(
            "--health-http",
            metavar="PORT[/PATH]",
            help="Healthy while GET on this port in the machine answers 2xx or 3xx.",
        ),
        click.option("--seed", metavar="SNAPSHOT", help="Begin with this snapshot's disk; then without IMAGE."),
        click.option(
            "--queue", type=Duration(minimum_s=1), metavar="TIME", help="Wait that long for a place where none is free."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def brought_fields(
    *,
    secrets: tuple[str, ...],
    secret_file: Any,
    files: tuple[str, ...],
    startup_script: Any,
    startup_timeout: float | None,
    manifest: Any,
    agent: str | None,
    gateway_url: str | None,
    gateway_token: str | None,
    health_http: str | None,
    seed: str | None,
    queue: float | None,
) -> "CreateFields":
    """The options as the client's keywords. Raises a usage error."""
    read = _read_secrets(secret_file.read()) if secret_file is not None else {}
    return {
        "secrets": read | variables(secrets, "--secret"),
        "files": dict(_read_file(pair) for pair in files),
        "startup_script": startup_script.read() if startup_script is not None else "",
        "startup_script_timeout_seconds": round(startup_timeout or 0),
        "manifest": manifest.read() if manifest is not None else b"",
        "agent": _read_agent(agent) if agent else {},
        "gateway_url": gateway_url or "",
        "gateway_token": gateway_token or "",
        "healthcheck": _http_check(health_http) if health_http else {},
        "seed_snapshot_id": seed or "",
        "queue_seconds": round(queue or 0),
    }


def _read_secrets(text: str) -> dict[str, str]:
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise click.UsageError(f"--secret-file holds no JSON: {error}") from error
        if not all(isinstance(value, str) for value in found.values()):
            raise click.UsageError("--secret-file: every value must be text")
        return dict(found)
    lines = [line.strip() for line in text.splitlines()]
    return variables(tuple(line for line in lines if line and not line.startswith("#")), "--secret-file")


def _read_file(pair: str) -> tuple[str, tuple[bytes, str]]:
    local, colon, remote = pair.rpartition(":")
    if not colon or not local or not remote.startswith("/"):
        raise click.UsageError(f"--file takes LOCAL:/REMOTE, not {pair!r}")
    path = Path(local)
    try:
        content = path.read_bytes()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise click.UsageError(f"--file {local}: {error.strerror}") from error
    return remote, (content, f"{mode:04o}")


def _read_agent(text: str) -> str | dict[str, Any]:
    if not text.startswith("@"):
        return text
    try:
        found = json.loads(sys.stdin.read() if text == "@-" else Path(text[1:]).read_text())
    except OSError as error:
        raise click.UsageError(f"--agent {text[1:]}: {error.strerror}") from error
    except ValueError as error:
        raise click.UsageError(f"--agent {text[1:]} holds no JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.UsageError(f"--agent {text[1:]}: a JSON object is needed")
    return found


def _http_check(text: str) -> dict[str, Any]:
    port, slash, path = text.partition("/")
    if not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise click.UsageError(f"--health-http takes PORT or PORT/PATH, not {text!r}")
    return {"http": {"port": int(port)} | ({"path": slash + path} if slash else {})}
