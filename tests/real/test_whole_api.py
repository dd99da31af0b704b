"""The whole way: control plane, host daemon, real machines. What a create brings along, and how environments end."""

import asyncio
import base64
import contextlib
import json
import os
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "control"))

from control_harness import Running, next_message, running, stream, until
from real_host import Host

from fusevm.control.config import HostSetting
from fusevm.testing.clock import FakeClock
from fusevm.testing.fake_host import FakeHost

#: Software emulation on two cores, and whatever else the machine does.
PATIENCE_S = 120.0
SECRET = "w0rd-that-must-not-reach-a-disk"

#: Serves on port 8000, for who knows the token; fails its health check while /tmp/sick exists.
DAEMON = """
import http.server, os, sys
token = os.environ["FUSE_AUTH_TOKEN"]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        is_known = self.headers.get("Authorization") == "Bearer " + token
        status = (500 if os.path.exists("/tmp/sick") else 200) if self.path == "/health" else 200 if is_known else 401
        self.send_response(status); self.end_headers()
    def log_message(self, *words): pass
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""
#: Waits for the daemon to listen: that it runs does not say so.
ASK = """
import socket, sys, time, urllib.request, urllib.error
request = urllib.request.Request("http://127.0.0.1:8000/", headers={"Authorization": "Bearer " + sys.argv[1]})
until = time.monotonic() + 50
while socket.socket().connect_ex(("127.0.0.1", 8000)) and time.monotonic() < until: time.sleep(0.1)
try: print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as e: print(e.code)
"""


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def with_daemon(**more: Any) -> dict[str, Any]:
    return {
        "files": {"/opt/daemon.py": b64(DAEMON), "/opt/ask.py": b64(ASK)},
        "agent": {
            "command": ["python3", "/opt/daemon.py"],
            "drain_command": ["sh", "-c", "echo drained > /root/drained"],
        },
        **more,
    }


@contextlib.asynccontextmanager
async def serving(host: Host, **changes: Any) -> AsyncIterator[Running]:
    """A control plane in front of the daemon of `host`, by its Unix socket."""
    await host.start()
    setting = HostSetting(id="default", url=f"unix://{host.socket}")
    slow = {"wait_s": PATIENCE_S, "reconcile_s": 0.5, "heartbeat_s": 0.5}
    async with running(FakeHost("unused"), **{"hosts": (setting,), **slow, **changes}) as server:
        server.http.timeout = PATIENCE_S + 10
        yield server
        for env in (await server.http.get("/v1/environments")).json()["environments"]:
            await server.http.delete(f"/v1/environments/{env['id']}")

        async def all_gone() -> bool:
            return (await server.http.get("/v1/environments")).json() == {"environments": []}

        await until(all_gone, PATIENCE_S)
    await host.stop()


async def sh(server: Running, task_id: str, command: str) -> str:
    answer = (await server.act(task_id, "exec", {"shell": command})).json()
    assert answer["exit_code"] == 0, answer
    return str(answer["stdout"])


async def ask(server: Running, task_id: str, token: str) -> str:
    return (await sh(server, task_id, f"python3 /opt/ask.py {shlex.quote(token)}")).strip()


async def eventually(server: Running, task_id: str, **wanted: Any) -> dict[str, Any]:
    """Wait until the environment shows these values (`agent__state="running"`)."""
    shown: dict[str, Any] = {}

    async def is_so() -> bool:
        shown.clear()
        shown.update((await server.get(task_id)).json())
        return all(_value(shown, name) == value for name, value in wanted.items())

    await until(is_so, PATIENCE_S)
    return shown


def _value(shown: dict[str, Any], name: str) -> Any:
    for part in name.split("__"):
        shown = shown.get(part, {})
    return shown


async def test_what_a_create_brings_is_there_and_a_daemon_is_kept_alive(host: Host) -> None:
    async with serving(host) as server:
        made = await server.create(
            "whole",
            **with_daemon(
                secrets={"API_KEY": SECRET},
                manifest_inline=b64('{"version":"1","workspace":"/work","env":{"KEY":{"secret":"API_KEY"}}}'),
                startup_script='echo hello from $PWD; echo done > /root/started; test "$KEY" = ' + SECRET,
                healthcheck={"http": {"port": 8000, "path": "/health"}, "interval_seconds": 1, "retries": 1},
            ),
        )
        assert made["state"] == "running", made
        assert await sh(server, "whole", "cat /root/started; pwd; stat -f -c %T /fuse") == "done\n/work\ntmpfs\n"
        assert SECRET in await sh(server, "whole", "cat /fuse/secrets.json")
        facts = await server.plane.store.facts_of(made["uid"], 0, 100)
        told = [stored.fact.message for stored in facts if stored.fact.kind == "startup_output"]
        assert told == ["hello from /work\n"]

        token = (await sh(server, "whole", "cat /fuse/auth-token")).strip()
        assert await ask(server, "whole", token) == "200"
        assert await ask(server, "whole", "guessed") == "401"

        await eventually(server, "whole", health__state="passing", agent__state="running")
        await sh(server, "whole", "touch /tmp/sick")
        await eventually(server, "whole", health__state="failing")
        await sh(server, "whole", "rm /tmp/sick")
        await eventually(server, "whole", health__state="passing")

        await sh(server, "whole", "pkill -9 -f [/]opt/daemon.py")
        await eventually(server, "whole", agent__restarts=1, agent__state="running", agent__exit_code=137)

        assert (await server.act("whole", "rotate-token")).status_code == 204
        fresh = (await sh(server, "whole", "cat /fuse/auth-token")).strip()
        assert fresh != token
        assert await ask(server, "whole", token) == "401"
        assert await ask(server, "whole", fresh) == "200"

        mark = f"written in the machine {made['uid']}"
        assert await sh(server, "whole", f"echo '{mark}' > /root/mark; sync") == ""
        overlays = [path for path in disks(host) if "overlay" in path.name]
        assert any(holds(path, mark) for path in overlays), "a secret on the disk would be found, too"
        assert [path.name for path in disks(host) if holds(path, SECRET) or holds(path, fresh)] == []

        drained = (await server.act("whole", "drain")).json()
        assert (drained["state"], drained["agent"]["state"], drained.get("error", "")) == ("draining", "drained", "")
        answer = await server.http.get("/v1/environments/fuse-whole/files?path=/root/drained")
        assert answer.content == b"drained\n"
        assert [path.name for path in disks(host) if holds(path, SECRET) or holds(path, fresh)] == []


def disks(host: Host) -> list[Path]:
    """Everything that the host keeps on its disk."""
    return [path for path in host.data.rglob("*") if path.is_file() and path.stat().st_size]


def holds(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()


async def test_the_credentials_of_two_environments_are_mutually_refused(host: Host) -> None:
    async with serving(host) as server:
        await asyncio.gather(server.create("a", **with_daemon()), server.create("b", **with_daemon()))
        tokens = {task: (await sh(server, task, "cat /fuse/auth-token")).strip() for task in ("a", "b")}
        for task, other in (("a", "b"), ("b", "a")):
            assert await ask(server, task, tokens[task]) == "200"
            assert await ask(server, task, tokens[other]) == "401"


async def test_a_startup_script_that_fails_is_told_with_its_last_words(host: Host) -> None:
    async with serving(host) as server:
        made = await server.create_ends("bad", startup_script="echo no such thing >&2; exit 7")

        async def has_ended() -> bool:
            return bool((await server.get("bad", uid=made["uid"])).json().get("ended_at"))

        await until(has_ended, PATIENCE_S)
        ended = (await server.get("bad", uid=made["uid"])).json()
        assert (ended["state"], ended["reason"]) == ("failed", "startup_failed")
        assert "exit status 7" in ended["error"]
        assert "no such thing" in ended["error"]


async def test_a_startup_script_that_hangs_ends_at_its_own_limit(host: Host) -> None:
    async with serving(host) as server:
        made = await server.create_ends("slow", startup_script="sleep 600", startup_script_timeout_seconds=2)
        shown = (await server.get("slow", uid=made["uid"])).json()
        assert shown["reason"] == "startup_failed"
        assert "within 2 s" in shown["error"]


async def test_an_environment_ends_when_it_is_idle_or_its_time_is_over(host: Host) -> None:
    clock = FakeClock()
    async with serving(host, clock=clock) as server:
        idle = await server.create("idle", spec={"idle_timeout_seconds": 60})
        short = await server.create("short", spec={"max_runtime_seconds": 3600})
        assert (idle["state"], short["state"]) == ("running", "running")
        async with stream(server, "/v1/environments/fuse-idle/events") as events:
            await next_message(events)
            clock.advance(40_000)
            await sh(server, "idle", "true")  # used: it stays
            clock.advance(40_000)
            assert (await server.get("idle")).json()["state"] == "running"
            clock.advance(30_000)
            states = []
            while "destroyed" not in states:
                states.append((await next_message(events))[1]["state"])
        assert (await server.get("idle", uid=idle["uid"])).json()["reason"] == "idle"
        for _ in range(60):
            clock.advance(60_000)
            await asyncio.sleep(0.05)  # heartbeats must keep up with the clock, or the host would be given up

        async def is_over() -> bool:
            return (await server.get("short", uid=short["uid"])).json()["state"] == "destroyed"

        await until(is_over, PATIENCE_S)
        assert (await server.get("short", uid=short["uid"])).json()["reason"] == "max_runtime"


async def fuse(server: Running, *words: str) -> str:
    """Run the command line against the server; its output."""
    environment = {**os.environ, "FUSE_BASE_URL": server.url, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fusevm", *words),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await program.communicate()
    assert program.returncode == 0, err.decode()
    return out.decode()


async def test_a_snapshot_goes_back_and_begins_another_environment(host: Host) -> None:
    async with serving(host) as server:
        await server.create("first", secrets={"API_KEY": SECRET})
        await sh(server, "first", "echo before > /state")
        snapshot_id = (await fuse(server, "snapshot", "create", "first", "--name", "base")).strip()
        await sh(server, "first", "echo after > /state")
        listed = json.loads(await fuse(server, "snapshot", "list", "-o", "json"))
        assert snapshot_id in json.dumps(listed)
        await fuse(server, "snapshot", "restore", snapshot_id)
        assert await sh(server, "first", "cat /state") == "before\n"
        assert SECRET in await sh(server, "first", "cat /fuse/secrets.json"), "secrets are not of the disk"
        await server.create("second", seed_snapshot_id=snapshot_id)
        assert await sh(server, "second", "cat /state; hostname") == "before\nsecond\n"
        await fuse(server, "snapshot", "rm", snapshot_id)
        assert list((host.data / "snapshots").iterdir()) == []
        assert await sh(server, "second", "cat /state") == "before\n"
