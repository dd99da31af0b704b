"""Write the parts of the documentation that are derived from code. `--check` only compares, as the test does."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import fusevm
from fusevm.control.metrics import Metrics as ControlMetrics
from fusevm.core.diagram import render_states
from fusevm.host.metrics import Metrics as HostMetrics
from fusevm.model import errors
from fusevm.model.environment import State
from fusevm.model.errors import error_classes, field_names
from fusevm.model.fact import Kind
from fusevm.wire.errors import FlatError
from fusevm.wire.host_routes import HOST_ROUTES
from fusevm.wire.openapi import render_openapi
from fusevm.wire.routes import BODY_ERRORS, COMMON_ERRORS, ROUTES, Payload, Route, Scope, errors_of

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


def render_host_openapi() -> str:
    """The host daemon's API."""
    document = render_openapi(fusevm.__version__, HOST_ROUTES, title="Fuse host daemon", failure=FlatError)
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def render_api() -> str:
    """Every public route for people."""
    lines = [
        "# The REST API",
        "",
        "Every route, from the one table in `fusevm.wire.routes`; with all types: [openapi.json](openapi.json).",
        "Reasons of errors: [errors.md](errors.md). What events say: [events.md](events.md). The token is sent as",
        "`Authorization: Bearer <token>`; the master token has every right. In brackets: the right that a route needs.",
        "",
        f"Every route may answer {_reasons(COMMON_ERRORS)};",
        f"every route with a body also {_reasons(BODY_ERRORS)}. They are not repeated below.",
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
    common = {*COMMON_ERRORS, *BODY_ERRORS}
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
    Kind.DEAD_LETTER: "The machine could not be destroyed for the fifth time. The attempts go on, but a person should "
    "look at the host; `message` is the last problem.",
}
#: Why environments end, beside the reasons of errors. A test compares them with what `core.lifecycle` says.
ENDINGS = {
    "deleted": (State.DESTROYED, "somebody deleted it"),
    "max_runtime": (State.DESTROYED, "`max_runtime_seconds` have passed since its creation"),
    "idle": (State.DESTROYED, "nobody used it for `idle_timeout_seconds`"),
    "linger": (State.DESTROYED, "it was drained, and nobody deleted it in time"),
    "boot_timeout": (State.FAILED, "the machine did not come up before the deadline"),
    "machine_exited": (State.FAILED, "the machine ended by itself: shut down inside, crashed, or killed on the host"),
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
        "## Kinds",
        "",
        "| event | meaning |",
        "|---|---|",
        *(f"| `{kind}` | {text} |" for kind, text in KINDS.items()),
        "",
        "Kept for later and not sent yet: " + ", ".join(f"`{kind}`" for kind in Kind if kind not in KINDS) + ".",
        "",
        "## Reasons of an end",
        "",
        "Stable, in `reason` of the events and of the environment, from the moment when the end begins.",
        "",
        "| reason | ends as | because |",
        "|---|---|---|",
        *(f"| `{reason}` | `{state}` | {text} |" for reason, (state, text) in ENDINGS.items()),
        "",
        "When the host refuses to boot the machine, the environment ends as `failed` with the reason of the host's",
        "error ([errors.md](errors.md)): " + ", ".join(f"`{reason}`" for reason in refusals) + ", or a rarer one.",
    ]
    return "\n".join(lines) + "\n"


# -- metrics -------------------------------------------------------------------------------------------------------


def render_metrics() -> str:
    """Every metric of both programs."""
    control, host = ControlMetrics(), HostMetrics()
    host.watch_machines(list, lambda: 0)
    lines = [
        "# Metrics",
        "",
        "Prometheus text at `GET /metrics`. A counter also has `..._created`, the time of its first increment; a",
        "histogram has `..._bucket`, `..._sum`, `..._count`. Generated from the programs.",
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
        sampled = {name: None for sample in metric.samples for name in sample.labels if name != "le"}
        name = metric.name + ("_total" if metric.type == "counter" else "")
        names = ", ".join(f"`{label}`" for label in labels.get(metric.name, sampled))
        rows.append(f"| `{name}` | {metric.type} | {names} | {_cell(metric.documentation)} |")
    return sorted(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/api.md": render_api,
    "docs/errors.md": render_errors,
    "docs/events.md": render_events,
    "docs/host-openapi.json": render_host_openapi,
    "docs/metrics.md": render_metrics,
    "docs/openapi.json": render_public_openapi,
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
