"""Debian's Prometheus as a process of its own, on a port that the kernel chose."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

#: Where `tools/setup.sh dev` unpacks it.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuse/prometheus"
#: A busy machine may take its time.
PATIENCE_S = 120.0


def program(name: str) -> str | None:
    """Path of `prometheus` or `promtool`, or None."""
    return shutil.which(name, path=f"{CACHE}{os.pathsep}{os.environ.get('PATH', os.defpath)}")


class Prometheus:
    """A running server."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def ask(self, path: str, **params: str) -> Any:
        """The data of an answer of its API."""
        answer = await self._http.get(f"/api/v1/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    async def query(self, text: str) -> dict[str, float]:
        """An instant query: labels (without those of the scrape) as JSON to value."""
        found = await self.ask("query", query=text)
        return {_labels(one["metric"]): float(one["value"][1]) for one in found["result"]}

    async def until(self, text: str, wanted: dict[str, float]) -> None:
        """Query until the answer is as wished."""
        seen: dict[str, float] = {}
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (seen := await self.query(text)) != wanted:
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise AssertionError(f"{text}: {seen}, not {wanted}") from error


def _labels(metric: dict[str, str]) -> str:
    own = {name: value for name, value in metric.items() if name not in ("__name__", "instance", "job")}
    return json.dumps(own, sort_keys=True) if own else ""


@contextlib.asynccontextmanager
async def prometheus(folder: Path, config: Path) -> AsyncIterator[Prometheus]:
    """Run it with its data in `folder`."""
    command = [program("prometheus") or "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
    log = folder / "log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command, "--web.listen-address=127.0.0.1:0", stdout=out, stderr=out
        )
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (port := listening_port(process.pid)) is None:
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            async with asyncio.timeout(PATIENCE_S):
                while (await http.get("/-/ready")).status_code != 200:
                    await asyncio.sleep(0.05)
            yield Prometheus(http)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def listening_port(pid: int) -> int | None:
    """The TCP port on which a process listens; None: not yet."""
    inodes = set()
    with contextlib.suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(str(link.readlink()))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in inodes:
            return int(local.rpartition(":")[2], 16)
    return None
