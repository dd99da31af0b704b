"""A real Prometheus scrapes `fuse serve` and a host daemon, with the configuration that we ship."""

import asyncio
import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from prometheus_server import PATIENCE_S, program, prometheus

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.config import Listen
from fusevm.host.listeners import bind_tcp, serving
from fusevm.host.tls import Identity, ensure_identity, make_ssl_context
from fusevm.sdk import AsyncFuse
from fusevm.testing.host_world import World

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy/prometheus"
HAS_BOTH = program("prometheus") is not None and program("promtool") is not None
pytestmark = pytest.mark.skipif(not HAS_BOTH, reason="no Prometheus; `tools/setup.sh dev` fetches it")
TOKEN = "master-token-of-this-test"


class Stack(NamedTuple):
    """What is scraped."""

    url: str
    host_port: int
    identity: Identity
    #: Ends the host daemon's listener.
    silence: asyncio.Event


@contextlib.asynccontextmanager
async def host_daemon(folder: Path) -> AsyncIterator[tuple[int, Identity, asyncio.Event]]:
    """A host daemon with a driver that only pretends, on a TLS port, until the event is set."""
    async with World(folder).daemon() as daemon:
        identity = ensure_identity(folder)
        listener = bind_tcp(Listen(host="127.0.0.1", port=0))
        app = Boundary(make_router(daemon), daemon.metrics, secret=identity.secret)
        silence, is_up = asyncio.Event(), asyncio.Event()

        async def serve() -> None:
            async with serving(listener, app, make_ssl_context(identity)):
                is_up.set()
                await silence.wait()
                daemon.events.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(serve())
            await is_up.wait()
            try:
                yield listener.getsockname()[1], identity, silence
            finally:
                silence.set()


@contextlib.asynccontextmanager
async def stack(folder: Path) -> AsyncIterator[Stack]:
    """A host daemon, and `fuse serve` that has it as `default`."""
    async with host_daemon(folder) as (port, identity, silence):
        variables = {
            "FIRECRACKER_BASE_URL": f"https://127.0.0.1:{port}",
            "FIRECRACKER_TOKEN": identity.token,
            "ORCH_AUTH_TOKEN": TOKEN,
            "ORCH_LISTEN": "127.0.0.1:0",
            "DATABASE_URL": str(folder / "control/fuse.db"),
        }
        errors = folder / "serve.log"
        with errors.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).parent / "fuse"),
                "serve",
                stdout=asyncio.subprocess.PIPE,
                stderr=out,
                env=os.environ | variables,
            )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(PATIENCE_S):
                line = (await process.stdout.readline()).decode()
            assert " at http://" in line, errors.read_text()
            yield Stack(line.split()[-1], port, identity, silence)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()


def configured(folder: Path, running: Stack) -> Path:
    """The shipped configuration, for these targets and in a hurry."""
    secret = folder / "host.secret"
    secret.write_text(running.identity.secret)
    text = (SHIPPED / "prometheus.yml").read_text()
    for shipped, ours in (
        ("127.0.0.1:8080", running.url.removeprefix("http://")),
        ("127.0.0.1:8090", f"127.0.0.1:{running.host_port}"),
        ("/etc/prometheus/fuse-host.secret", str(secret)),
        ("interval: 15s", "interval: 250ms"),
        ("- fuse-rules.yml", f"- {SHIPPED / 'fuse-rules.yml'}"),
    ):
        assert shipped in text
        text = text.replace(shipped, ours)
    path = folder / "prometheus.yml"
    path.write_text(text)
    return path


def promtool(*words: str, stdin: bytes = b"") -> tuple[int, str]:
    done = subprocess.run([program("promtool") or "promtool", *words], input=stdin, capture_output=True, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


async def test_prometheus_scrapes_both_programs_and_sees_what_is_there(tmp_path: Path) -> None:
    async with stack(tmp_path) as running, AsyncFuse(running.url, TOKEN) as fuse:
        made = await fuse.environments.create("t1")
        await fuse.environments.create("t2")
        await fuse.environments.delete("fuse-t2")
        config = configured(tmp_path, running)
        assert promtool("check", "config", str(config))[0] == 0
        async with prometheus(tmp_path, config) as prom:
            await prom.until('up{job="fuse"}', {"": 1})
            await prom.until('up{job="fuse-host"}', {"": 1})
            targets = (await prom.ask("targets"))["activeTargets"]
            assert {(one["health"], one["lastError"]) for one in targets} == {("up", "")}
            await prom.until("orchestrator_fleet_tracked_vms", {'{"state": "running"}': 1})
            host = '{"host": "default"}'
            await prom.until("orchestrator_host_up", {host: 1})
            await prom.until("orchestrator_fleet_provider_vms", {host: 1})
            await prom.until('sum(fuse_host_machines{phase="running"})', {"": 1})
            await prom.until('orchestrator_operations_total{op="boot"}', {'{"op": "boot", "result": "ok"}': 2})
            await prom.until("sum(orchestrator_environments_ended_total)", {"": 1})
            await prom.until(
                'orchestrator_host_allocated{resource="vm_count"} > 0',
                {'{"host": "default", "resource": "vm_count"}': 1},
            )
            await prom.until("orchestrator_store_up", {"": 1})
            await prom.until('sum(fuse_host_boot_seconds_count{phase="agent"})', {"": 2})
            groups = (await prom.ask("rules"))["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            assert len(rules) > 10
            await prom.until("count(ALERTS)", {})
            running.silence.set()
            await prom.until("orchestrator_host_up", {host: 0})
            await prom.until("orchestrator_fleet_provider_vms", {})
            await prom.until('count(ALERTS{alertname="FuseHostDown"})', {"": 1})
            rules = [rule for group in (await prom.ask("rules"))["groups"] for rule in group["rules"]]
            assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
        assert made.state == "running"


async def test_the_metrics_are_named_as_prometheus_wants(tmp_path: Path) -> None:
    async with stack(tmp_path) as running, AsyncFuse(running.url, TOKEN) as fuse:
        await fuse.environments.create("t1", startup_script="")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        async with httpx.AsyncClient(verify=context) as http:
            ours = (await http.get(f"{running.url}/metrics")).content
            bearer = {"authorization": f"Bearer {running.identity.secret}"}
            host = await http.get(f"https://127.0.0.1:{running.host_port}/metrics", headers=bearer)
            refused = await http.get(f"https://127.0.0.1:{running.host_port}/metrics")
        assert (host.status_code, refused.status_code) == (200, 401)
        for text in (ours, host.content):
            assert promtool("check", "metrics", stdin=text) == (0, "")
        assert promtool("check", "metrics", stdin=b"# TYPE bad_total gauge\nbad_total 1\n")[0] != 0


def test_the_rules_that_we_ship_are_valid_and_name_metrics_that_exist() -> None:
    path = SHIPPED / "fuse-rules.yml"
    code, said = promtool("check", "rules", str(path))
    assert code == 0, said
    documented = (ROOT / "docs/metrics.md").read_text()
    named = set(re.findall(r"(?:orchestrator|fuse_host)_\w+", path.read_text()))
    assert named
    for name in named:
        assert f"`{name.removesuffix('_bucket')}`" in documented, name
