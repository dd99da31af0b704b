"""The OpenAPI document as schemathesis sees it, the servers that are asked, and what every answer is held to."""

import contextlib
import copy
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import schemathesis
from control_process import Server, serving
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi import checks

import fusevm
from fusevm.testing.postgres import PostgresServer
from fusevm.wire.openapi import render_openapi

TOKEN = "schemathesis-token"
#: Reasons of failures of the server's own that can honestly occur, by status: not built, no room, and a host that
#: somebody registered where nothing listens. All else, whatever the document declares, is a fault of the server.
HONEST = {
    501: {"unimplemented", "not_supported"},
    503: {"no_capacity", "no_hosts", "host_unreachable"},
}
#: With machines, commands and boots take time, which a body may limit.
HONEST_WITH_MACHINES = HONEST | {504: {"timeout", "boot_timeout", "setup_timeout"}}
DOCUMENT = render_openapi(fusevm.__version__)
#: Kinds of `server` that have a host daemon; the others pretend.
WITH_MACHINES = ("machines", "postgres")
#: A stream is read up to its first message.
CONFIG = schemathesis.Config.from_dict({"request-timeout": 60.0, "max-stream-events": 1})


def settings_of(**changes: Any) -> settings:
    """The same requests in every run."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
        **changes,
    )


def read(document: dict[str, Any]) -> Any:
    """A document as schemathesis uses it. The stream of all events has no message until something happens, and is left
    to `test_event_streams`."""
    return schemathesis.openapi.from_dict(document, config=CONFIG).exclude(operation_id="stream_events")


# -- what every answer is held to ----------------------------------------------------------------------------------


@schemathesis.serializer("application/x-tar")
def bytes_as_they_are(_ctx: Any, value: Any) -> bytes:
    """Whatever is thought of as an archive."""
    return bytes(value) if isinstance(value, bytes | bytearray) else str(value).encode("utf-8", "surrogatepass")


def _check_failures(response: Any, honest: dict[int, set[str]]) -> None:
    status = response.status_code
    if status >= 500 and response.request.method == "HEAD":  # has no body that says why
        assert status in honest, status
    elif status >= 500:
        reason = response.json().get("error", {}).get("details", {}).get("reason")
        assert reason in honest.get(status, ()), f"{status}: {response.text[:500]}"


@schemathesis.check
def no_failure(_ctx: Any, response: Any, _case: Any) -> None:
    """Nothing is the fault of a server that pretends its machines."""
    _check_failures(response, HONEST)


@schemathesis.check
def no_failure_with_machines(_ctx: Any, response: Any, _case: Any) -> None:
    """Nothing is the fault of a server with machines."""
    _check_failures(response, HONEST_WITH_MACHINES)


_AS_DECLARED = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


def checks_of(kind: str, *, is_strict: bool = False) -> list[Any]:
    """What every answer of a kind of `server` is held to. `is_strict`: also that a body that the document forbids is
    refused. Rows that share a path have bodies of several kinds, and the contract takes a page size that cannot be read
    for the default."""
    failures = no_failure_with_machines if kind in WITH_MACHINES else no_failure
    return [failures, *_AS_DECLARED, *([checks.negative_data_rejection] if is_strict else [])]


# -- requests that can succeed -------------------------------------------------------------------------------------

PATHS = ("/tmp/file", "/tmp/folder", "/tmp/folder/file", "/tmp", "/")
#: Bodies with which operations can succeed, by the value that selects the row, else by the id of the operation.
BODIES: dict[str, tuple[Any, ...]] = {
    "exec": ({"cmd": ["echo", "x"]}, {"shell": "echo x; exit 3"}),
    "start_process": ({"cmd": ["echo", "x"]}, {"cmd": ["cat"], "stdin": True}, {"cmd": ["true"], "key": "k"}),
    "write_file": (b"contents",),
    "signal": ({"signal": "TERM"},),
    "stat": tuple({"path": path} for path in PATHS),
    "list": tuple({"path": path} for path in PATHS),
    "mkdir": ({"path": "/tmp/folder"},),
    "move": ({"path": "/tmp/file", "to": "/tmp/folder/file"}, {"path": "/tmp/folder", "to": "/tmp/other"}),
    "remove": ({"path": "/tmp/folder", "recursive": True}, {"path": "/tmp/file"}),
    "register_host": (
        {
            "id": "nowhere",
            "url": "https://127.0.0.1:1",
            "token": f"secret.{'ab' * 32}",
            "capacity": {"cpus": 1, "ram_mb": 1024, "storage_gb": 10, "vm_count": 1},
        },
    ),
    "create_api_key": ({"label": "of a walk"}, {"tenant": "acme", "scopes": ["environments:read"]}),
    "create_environment": (
        {},
        {"startup_script": "echo x"},
        {"agent": {"command": ["sleep", "1"], "drain_command": ["true"]}},
        {"healthcheck": {"exec": ["true"]}},
        {"queue_seconds": 1, "spec": {"idle_timeout_seconds": 60}},
    ),
}


#: Without it no environment could be made any more.
LAST_HOSTS = ("stub", "default")


class Possible:
    """Makes requests possible. Keeps count, so that no two environments are of the same task."""

    def __init__(self) -> None:
        self._tasks = itertools.count(1)

    def make(self, case: Any, number: int) -> bool:
        """Make every other request, by a number, one that can succeed if what it is about is there. Has it another body
        now?"""
        operation = case.operation.definition.raw["operationId"]
        if operation == "delete_host" and case.path_parameters.get("id") in LAST_HOSTS:
            case.path_parameters["id"] = "nowhere"
        query = case.query or {}
        query.pop("follow", None)  # it may go on for ever
        if number % 2:
            return False
        if "path" in query:
            case.query["path"] = PATHS[number // 2 % len(PATHS)]
        bodies = BODIES.get(str(query.get("action") or query.get("op") or operation), ())
        if bodies:
            case.body = copy.copy(bodies[number // 2 % len(bodies)])
            case.media_type = "application/octet-stream" if isinstance(case.body, bytes) else "application/json"
        if operation == "create_environment":
            case.body["task_id"] = f"task-{next(self._tasks)}"
        return bool(bodies)


def number_of(case: Any) -> int:
    """A number that depends on the request only."""
    digest = hashlib.sha256(repr((case.path_parameters, case.query, case.body)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


# -- servers -------------------------------------------------------------------------------------------------------

_CODE = "import sys; sys.path.insert(0, sys.argv[1]); import fuzzed_programs; fuzzed_programs.{name}(sys.argv[2])"


def _serving(name: str, folder: Path, argument: str) -> contextlib.AbstractContextManager[Server]:
    return serving(folder, str(Path(__file__).parent), argument, code=_CODE.format(name=name))


@contextlib.contextmanager
def server(kind: str, folder: Path, postgres: PostgresServer) -> Iterator[str]:
    """The URL of a fresh control plane: `stub` pretends machines, `open` too and asks for no token, `machines` has a
    host daemon with fake ones, `postgres` keeps all of that in PostgreSQL."""
    with contextlib.ExitStack() as stack:
        settings = {"listen": "127.0.0.1:0", "log_level": "error", "wait_s": 2.0, "ready_file": str(folder / "ready")}
        if kind != "open":
            settings |= {"auth_token": TOKEN}
        if kind in WITH_MACHINES:
            (folder / "host").mkdir()
            daemon = stack.enter_context(_serving("machines", folder / "host", str(folder / "host")))
            url, token = daemon.url.split()
            settings |= {"hosts": [{"id": "default", "url": url, "token": token}], "encryption_key": "5c" * 32}
        if kind == "postgres":
            settings |= {"database": stack.enter_context(postgres.database())}
        running = stack.enter_context(_serving("control", folder, json.dumps(settings)))
        yield running.url
        assert running.end() == 0


def headers_of(kind: str) -> dict[str, str]:
    return {} if kind == "open" else {"authorization": f"Bearer {TOKEN}"}
