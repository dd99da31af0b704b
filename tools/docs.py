"""Write the parts of the documentation that are derived from code. `--check` only compares, as the test does."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import fusevm
from fusevm.cli.control_table import CONTROL, UNHONOURED
from fusevm.cli.host_table import HOST
from fusevm.cli.installation import to_text
from fusevm.cli.setting import Setting
from fusevm.control.fleet_gauges import FleetGauges
from fusevm.control.metrics import Metrics as ControlMetrics
from fusevm.control.store.protocol import Tally
from fusevm.core.diagram import render_states
from fusevm.host.metrics import Metrics as HostMetrics
from fusevm.model import errors
from fusevm.model.environment import State
from fusevm.model.errors import error_classes, field_names
from fusevm.model.fact import Kind
from fusevm.model.machine import Machine
from fusevm.wire.host_routes import HOST_ROUTES, render_host_openapi
from fusevm.wire.openapi import render_openapi
from fusevm.wire.routes import BODY_ERRORS, COMMON_ERRORS, GATE_ERRORS, ROUTES, Payload, Route, Scope, errors_of

ROOT = Path(__file__).resolve().parent.parent


def render_errors() -> str:
    """Every error as a table, by code and reason."""
    lines = [
        "# Errors",
        "",
        "Every answer that is no success carries `code` (short, the contract's) and `details.reason` (ours, stable).",
        "The other details are the fields listed here, as strings. Host daemon and guest agent use the same codes and",
        "reasons. Generated from `fusevm.model.errors`.",
        "",
        "| code | reason | status | retry helps | message | details |",
        "|---|---|---|---|---|---|",
    ]
    # Errors of the client's own (and of tests) are classes, too, but no answers.
    answers = [cls for cls in error_classes() if cls.__module__.startswith(errors.__name__)]
    for cls in sorted(answers, key=lambda item: (item.code, item.status, item.reason)):
        fields = ", ".join(f"`{name}`" for name in field_names(cls))
        retry = "yes" if cls.retryable else ""
        message = _cell(cls.template)
        lines.append(f"| `{cls.code}` | `{cls.reason}` | {cls.status} | {retry} | {message} | {fields} |")
    return "\n".join(lines) + "\n"


# -- routes --------------------------------------------------------------------------------------------------------


def render_public_openapi() -> str:
    """The public API, as `/openapi.json` serves it."""
    return json.dumps(render_openapi(fusevm.__version__), indent=1, ensure_ascii=False) + "\n"


def render_machine_openapi() -> str:
    """The host daemon's API, as its `/openapi.json` serves it."""
    return json.dumps(render_host_openapi(fusevm.__version__), indent=1, ensure_ascii=False) + "\n"


def render_api() -> str:
    """Every public route for people."""
    lines = [
        "# The REST API",
        "",
        "Every route, from the one table in `fusevm.wire.routes`; with all types: [openapi.json](openapi.json).",
        "Reasons of errors: [errors.md](errors.md). What events say: [events.md](events.md). The token is sent as",
        "`Authorization: Bearer <token>`; the master token has every right, a key has those it was made with, and sees",
        "the environments of its tenant. In brackets: the right that a route needs. More: [access.md](access.md).",
        "",
        f"Every route may answer {_reasons(COMMON_ERRORS)};",
        f"every route with a body also {_reasons(BODY_ERRORS)};",
        f"every route that needs a right also {_reasons(GATE_ERRORS)}. They are not repeated below.",
        "",
    ]
    built = [route for route in ROUTES if not route.unimplemented]
    lines += ["| operation | what it does |", "|---|---|"]
    lines += [f"| [`{_operation(route)}`](#{route.name}) | {_cell(route.summary)} |" for route in built]
    for route in built:
        lines += ["", f'<a id="{route.name}"></a>', "", f"## {_operation(route)}", "", *_route_lines(route)]
    lines += ["", "## Answered with 501", "", "Part of the contract, and not there yet. The answer says why.", ""]
    lines += ["| operation | what it would do | why not |", "|---|---|---|"]
    for route in ROUTES:
        if route.unimplemented:
            lines.append(f"| `{_operation(route)}` | {_cell(route.summary)} | {_cell(route.unimplemented)} |")
    return "\n".join(lines) + "\n"


def _route_lines(route: Route) -> list[str]:
    right = "no key is needed" if route.scope is Scope.OPEN else f"right `{route.scope.value}`"
    lines = [f"{route.summary}. ({right})", ""]
    for param in route.params:
        traits = [param.place, param.kind, *(["required"] * param.is_required), *(["repeated"] * param.is_repeated)]
        lines.append(f"- `{param.name}` ({', '.join(traits)}): {param.summary}")
    if route.takes is not Payload.NONE:
        limit = f"at most {route.limit >> 10} KiB" if route.limit else "streamed, no limit"
        lines.append(f"- takes {_body(route.takes, route.request)}, {limit}")
    statuses = " or ".join(str(status) for status in route.statuses)
    lines.append(f"- answers {statuses}: {_body(route.gives, route.answer)}")
    common = {*COMMON_ERRORS, *BODY_ERRORS, *GATE_ERRORS}
    own = [cls for cls in errors_of(route) if cls not in common]
    if own:
        lines.append(f"- errors: {_reasons(own)}")
    return lines


def _operation(route: Route) -> str:
    selector = f"?{route.selector}={route.value}" if route.selector else ""
    return f"{route.method} {route.path}{selector}"


def _body(payload: Payload, kind: type | None) -> str:
    if payload is Payload.NONE:
        return "nothing"
    return f"`{payload.value}`" + (f" of `{kind.__name__}`" if kind is not None else "")


def _reasons(classes: Iterable[type]) -> str:
    return ", ".join(f"`{cls.reason}` ({cls.status})" for cls in classes)


# -- events --------------------------------------------------------------------------------------------------------

#: What the kinds say; the others are kept for what is not built yet.
KINDS = {
    Kind.STATE: "The environment has entered `state`; `reason` and `error` say why it ends.",
    Kind.STARTUP_OUTPUT: "What the startup script wrote: `message` is the text; `data` has `stream` and `offset`. "
    "About the first 64 KiB, every byte once, secrets masked; all of it is in the startup log.",
    Kind.EXEC: "A command that was run over the API has ended, or a background process was started: `message` says "
    "how, `cause` is the request; `data` has `how` (`exec`, `stream`, `shell`, `process`) and `exit_code`, `signal`, "
    "`timed_out`, `duration_ms` or `pid`; never arguments or output. Collected for a second and told together: at most "
    "10 in a round one by one, the others as a number (`omitted`). A control plane that is killed does not tell its "
    "last second; one that lost its database, or ends while it tells, may tell some twice, with the same `cause`.",
    Kind.AGENT: "News of the daemon: `reason` is its new state, or how a drain or a new token went; `data` has "
    "`restarts` and `exit_code`.",
    Kind.HEALTH: "The health check has come to another verdict: `reason` is `starting`, `passing` or `failing`.",
    Kind.SNAPSHOT: "News of a snapshot of it: `reason` says which, `data` has `snapshot_id`.",
    Kind.HOST: "News of its host: `placed` when it had to wait for a place and got one; else `reason` is the new "
    "health of the host, `message` the cause, and `data` has `host_id`. Told once the change is saved: a "
    "control plane that dies in between leaves it untold.",
    Kind.DEAD_LETTER: "The machine could not be destroyed for the fifth time. The attempts go on, but a person should "
    "look at the host; `message` is the last problem.",
}
#: Reasons of events that end nothing, beside the reasons of errors. A test compares them with what `core` says.
NEWS = {
    "drained": "the daemon has ended as it was asked to",
    "drain_failed": "the drain command failed, or the daemon had to be killed; `message` says which",
    "drain_timeout": "the drain was given up at its deadline",
    "token_rotated": "the daemon runs with the new token; the old one is refused",
    "network_changed": "the machine is held to its new network policy",
    "network_timeout": "the network was not changed before the deadline; it is put back",
    "network_put_back": "after a change that failed: the machine is held to the policy of before again",
    "rotate_timeout": "the new token was not delivered before the deadline",
    "creating": "a snapshot is being taken",
    "ready": "a snapshot is complete",
    "snapshot_timeout": "a snapshot was given up at its deadline; it is in state `error`",
    "restoring": "the machine is being put back to a snapshot",
    "restored": "the machine runs from the snapshot",
    "restore_timeout": "a restore was given up at its deadline; the snapshot stays usable",
    "cut_off": "the client or the host was gone before the end of a command, which is not known",
    "omitted": "so many more commands ended in the same second: `data` has `count`",
    "placed": "it waited, and got a place on a host",
    "unreachable": "the host has not answered for a while, or refuses the control plane; the machine is left alone",
    "lost": "the host was silent for so long that the environment is given up",
    "ok": "the host answers again",
}
#: Why environments end, beside the reasons of errors. A test compares them with what `core` says.
ENDINGS = {
    "deleted": (State.DESTROYED, "somebody deleted it"),
    "max_runtime": (State.DESTROYED, "`max_runtime_seconds` have passed since it got its place"),
    "idle": (State.DESTROYED, "nobody used it for `idle_timeout_seconds`, nor its published ports (`docs/network.md`)"),
    "linger": (State.DESTROYED, "it was drained, and nobody deleted it in time"),
    "no_capacity": (State.FAILED, "it waited for a place, and none was found within `queue_seconds`"),
    "boot_timeout": (State.FAILED, "the machine did not come up before the deadline"),
    "setup_timeout": (State.FAILED, "files, startup script and daemon were not in place before the deadline"),
    "machine_exited": (State.FAILED, "the machine was shut down inside, crashed, was killed on the host, or is stuck"),
    "machine_missing": (State.FAILED, "the host answers and no longer knows the machine"),
    "host_lost": (State.FAILED, "the host was silent for too long, or is no longer registered"),
}


def render_events() -> str:
    """What events say."""
    create = next(route for route in HOST_ROUTES if route.name == "create_machine")
    refusals = sorted({cls.reason for cls in create.errors if not cls.retryable})
    lines = [
        "# Events",
        "",
        "`GET /v1/environments/{id}/events` tells one environment's, `GET /v1/events` everybody's, as server-sent",
        "events: one line of JSON each (`EventBody` in [openapi.json](openapi.json)). The events of an environment are",
        "numbered without a gap; `id` is `<uid>.<number>`, the same on every stream, and is what `Last-Event-ID`",
        "takes. The first message of an environment's stream is its present state, without `id`. The stream ends after",
        "`destroyed` or `failed`. Comments (`: keepalive`) come while nothing happens. States: [states.md](states.md).",
        "",
        "Events that are older than `FUSE_RETENTION_SECONDS` are deleted, those of environments that live on included;",
        "the last event of an environment stays as long as its record. What is kept of an environment is always an",
        "unbroken run up to its last event, and a replay begins with the first of it: a first number above the",
        "one that follows `Last-Event-ID` (above 1, without it) means that what lies between is gone. `GET /v1/events`",
        "refuses the id of an event that is gone with 400 `bad_field`; begin without an id then, and read the present",
        "from the list of environments.",
        "",
        "## Kinds",
        "",
        "| event | meaning |",
        "|---|---|",
        *(f"| `{kind}` | {text} |" for kind, text in KINDS.items()),
        "",
        "## Reasons of an end",
        "",
        "Stable, in `reason` of the events and of the environment, from the moment when the end begins.",
        "",
        "| reason | ends as | because |",
        "|---|---|---|",
        *(f"| `{reason}` | `{state}` | {text} |" for reason, (state, text) in ENDINGS.items()),
        "",
        "When the host refuses to boot the machine, or the setup fails (`startup_failed`, `daemon_failed`), the",
        "environment ends as `failed` with the reason of the error; from the host:",
        ", ".join(f"`{reason}`" for reason in refusals) + ", or a rarer one ([errors.md](errors.md)).",
        "",
        "## Reasons of other events",
        "",
        "A drain, a new token, a snapshot or a restore that fails leaves the environment in its state; `reason` is",
        "then that of the error, or a timeout.",
        "",
        "| reason | meaning |",
        "|---|---|",
        *(f"| `{reason}` | {text} |" for reason, text in NEWS.items()),
    ]
    return "\n".join(lines) + "\n"


# -- metrics -------------------------------------------------------------------------------------------------------


class _NoMachines:
    """A host where nothing runs."""

    def records(self) -> list[Machine]:
        return []

    def quarantined(self) -> dict[str, object]:
        return {}


def render_metrics() -> str:
    """Every metric of both programs."""
    control, host = ControlMetrics(), HostMetrics()
    host.watch_machines(_NoMachines(), lambda: 0)
    control.registry.register(FleetGauges(tally=Tally(live={}, queued=0, queued_since_ms=None, snapshots={})))
    lines = [
        "# Metrics",
        "",
        "Prometheus text at `GET /metrics`. A counter also has `..._created`, the time of its first increment; a",
        "histogram has `..._bucket`, `..._sum`, `..._count`. A configuration for Prometheus and rules for alerts:",
        "`deploy/prometheus`. Generated from the programs.",
        "",
        "Gauges tell what is known now; what is not known is not there. Read from the database, at most every two",
        "seconds, and thus the same at every replica (take the maximum, not the sum):",
        "`orchestrator_fleet_tracked_vms`, `orchestrator_hosts`,",
        "`orchestrator_host_allocated`, `orchestrator_host_capacity`, `orchestrator_tenant_allocated`,",
        "`orchestrator_queue_length`, `orchestrator_queue_oldest_wait_seconds`, `orchestrator_snapshots`,",
        "`orchestrator_snapshots_bytes`. Told by the replica that watches a host: `orchestrator_host_up`,",
        "`orchestrator_fleet_provider_vms`, `orchestrator_watcher_lag_seconds`. While a host is silent, its",
        "`orchestrator_host_up` is 0, and its machines and its capacity are not there.",
        "",
        "Every name of the system that Fuse replaces is there. Limits are stored deadlines, which are not looked at",
        "twice: `..._suspected_total` counts ends that have begun, `..._failed_total` the same ones when over.",
        "An orphan that is dead-lettered is tried again all the same.",
    ]
    for title, metrics, registry in (
        ("Control plane", control, control.registry),
        ("Host daemon", host, host.registry),
    ):
        lines += ["", f"## {title}", "", "| name | type | labels | meaning |", "|---|---|---|---|"]
        lines += _metric_rows(metrics, registry)
    return "\n".join(lines) + "\n"


def _metric_rows(metrics: object, registry: CollectorRegistry) -> list[str]:
    labels: dict[str, Iterable[str]] = {}
    for wrapper in vars(metrics).values():
        if isinstance(wrapper, MetricWrapperBase):
            labels.update({metric.name: wrapper._labelnames for metric in wrapper.describe()})
    rows = []
    for metric in registry.collect():
        labels.setdefault(metric.name, getattr(metric, "_labelnames", ()))
        sampled = {name: None for sample in metric.samples for name in sample.labels if name != "le"}
        name = metric.name + ("_total" if metric.type == "counter" else "")
        names = ", ".join(f"`{label}`" for label in labels[metric.name] or sampled)
        rows.append(f"| `{name}` | {metric.type} | {names} | {_cell(metric.documentation)} |")
    return sorted(rows)


# -- settings ------------------------------------------------------------------------------------------------------


def render_settings() -> str:
    """Every setting of both programs."""
    lines = [
        "# Settings",
        "",
        "A value comes from the flag, else the variable, else the settings file, else the default; an empty variable",
        "counts as unset. The file is TOML: `--config`, else `FUSE_CONFIG`, else `$XDG_CONFIG_HOME/fuse/fuse.toml`,",
        "else `/etc/fuse/fuse.toml`. What nobody would read is refused, with the name that was probably meant.",
        "`fuse up` takes both tables; what belongs together (who reaches whom, with which token) it settles itself.",
        "What the settings of access mean: [access.md](access.md). Generated from `fusevm.cli.control_table` and",
        "`fusevm.cli.host_table`.",
        "",
        *_EXAMPLE,
        "",
        "## Control plane: `fuse serve`, section `[control]`",
        "",
        *_setting_rows(CONTROL),
        "",
        "Variables of the system that Fuse replaces which have no effect here; `fuse serve` says so when they are set:",
        "",
        *(f"- `{name}`: {why}" for name, (_, why) in UNHONOURED.items()),
        "",
        "## Agent profiles: sections `[agents.<name>]`",
        "",
        'A daemon that a create may name (`agent: "name"`) instead of describing it. The fields are those of an',
        "AgentSpec; a file has `content` (text) or `content_b64` (bytes), and `mode`. `download_url` may be left out",
        "where `AGENT_DOWNLOAD_URL` is set.",
        "",
        "## Host daemon: `fuse host serve`, section `[host]`",
        "",
        *_setting_rows(HOST),
    ]
    return "\n".join(lines) + "\n"


_EXAMPLE = """\
    [control]
    listen = ":8080"
    allowed_hosts = ["fuse.example.com"]

    [host]
    driver = "qemu"

    [agents.worker]
    download_url = "https://example.com/worker"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    port = 7000
    files."/etc/worker.toml" = { content = "colour = 'blue'", mode = "0600" }""".splitlines()


def _setting_rows(table: Iterable[Setting]) -> list[str]:
    rows = ["| name in the file | variable | flag | default | what |", "|---|---|---|---|---|"]
    for one in table:
        default = f"`{to_text(one.default)}`" if one.default not in (None, "", ()) else ""
        rows.append(f"| `{one.name}` | `{one.env}` | `{one.flag}` | {default} | {_cell(one.help)} |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/api.md": render_api,
    "docs/errors.md": render_errors,
    "docs/events.md": render_events,
    "docs/host-openapi.json": render_machine_openapi,
    "docs/metrics.md": render_metrics,
    "docs/openapi.json": render_public_openapi,
    "docs/settings.md": render_settings,
    "docs/states.md": render_states,
}


def stale() -> list[str]:
    """The generated documents that differ from what the code says now."""
    return [
        name
        for name, render in DOCUMENTS.items()
        if not (ROOT / name).exists() or (ROOT / name).read_text() != render()
    ]


def main() -> int:
    """Write the documents, or with --check name the stale ones."""
    names = stale()
    if "--check" in sys.argv:
        for name in names:
            print(f"{name} is out of date; run `make docs`")
        return 1 if names else 0
    for name in names:
        (ROOT / name).write_text(DOCUMENTS[name]())
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
