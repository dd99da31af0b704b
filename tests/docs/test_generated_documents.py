"""Documents that are derived from code equal the code, and say everything."""

import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from fusevm.control.command_log import CUT_OFF, OMITTED
from fusevm.core import endings, lifecycle
from fusevm.core import operations as core_operations
from fusevm.model.environment import TERMINAL, BootMachine, SetUpMachine
from fusevm.model.fact import Kind
from fusevm.model.host import HostHealth
from fusevm.wire.host_routes import HOST_ROUTES
from fusevm.wire.routes import ROUTES, Route, errors_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuse_docs", ROOT / "tools/docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_documents_are_up_to_date(docs: ModuleType):
    assert docs.stale() == [], "run `make docs`"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_every_route_is_told(docs: ModuleType, route: Route):
    page = docs.render_api()
    selector = f"?{route.selector}={route.value}" if route.selector else ""
    operation = f"{route.method} {route.path}{selector}"
    if route.unimplemented:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{operation}` |")]
        assert route.unimplemented in row
        return
    section = page.split(f"\n## {operation}\n")[1].split("\n## ")[0]
    head = page.split("\n## ")[0]
    for cls in errors_of(route):
        assert f"`{cls.reason}`" in section + head
    for param in route.params:
        assert f"`{param.name}`" in section
    for kind in (route.request, route.answer):
        assert kind is None or f"`{kind.__name__}`" in section


@pytest.mark.parametrize(("name", "routes"), [("openapi", ROUTES), ("host-openapi", HOST_ROUTES)])
def test_the_openapi_documents_know_every_operation_and_refer_to_what_they_define(name: str, routes: tuple[Route, ...]):
    text = (ROOT / f"docs/{name}.json").read_text()
    document = json.loads(text)
    for route in routes:
        assert route.method.lower() in document["paths"][route.path.replace(":path}", "}")]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            named = {item["name"] for item in operation["parameters"] if item["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert referred <= set(document["components"]["schemas"])


def test_every_reason_of_an_end_is_told(docs: ModuleType):
    source = inspect.getsource(lifecycle) + inspect.getsource(endings)
    said = set(re.findall(r'Ending\([^)]*reason="(\w+)"', source))
    said |= set(re.findall(r'_machine_gone\(.*"(machine_\w+)"', source))
    said |= {endings.TIMEOUTS[action][0] for action in (BootMachine, SetUpMachine)}
    assert said == set(docs.ENDINGS)
    assert {state for state, _ in docs.ENDINGS.values()} <= TERMINAL


def test_every_kind_that_is_sent_is_told(docs: ModuleType):
    assert set(docs.KINDS) == set(Kind)


def test_every_reason_of_other_news_is_told(docs: ModuleType):
    source = inspect.getsource(lifecycle) + inspect.getsource(core_operations)
    told = re.findall(r'reason="(\w+)"', source)
    about = re.findall(r'_told\([^"]*"(\w+)"', source)
    (drained,) = re.findall(r'reason = "(\w+)" if event.message else "(\w+)"', source)
    late = [reason for reason, _ in endings.TIMEOUTS.values()]
    assert {*told, *about, *drained, *late, *HostHealth, CUT_OFF, OMITTED} - set(docs.ENDINGS) == set(docs.NEWS)


def test_every_metric_of_both_programs_is_told(docs: ModuleType):
    page = docs.render_metrics()
    for module in ("control/metrics", "control/fleet_gauges", "host/metrics", "host/traffic_metrics"):
        source = (ROOT / f"src/fusevm/{module}.py").read_text()
        names = re.findall(r'"((?:orchestrator|fuse_host)_\w+)"', source)
        assert names
        for name in names:
            assert re.search(rf"\| `{name}(_total)?` \| \w+ \|", page), name
