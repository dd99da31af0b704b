"""The real agent as an ordinary process."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from agent_client import AgentClient

from fusevm.wire.streams import ByteStream, open_unix


class RealAgent:
    """`fused serve --unix`, its folder for secrets, and a web site on loopback."""

    def __init__(self, root: Path, process: asyncio.subprocess.Process) -> None:
        self.root = root
        self.folder = str(root / "fuse")
        self._process = process
        self._site: ThreadingHTTPServer | None = None

    async def open_stream(self) -> ByteStream:
        return await open_unix(str(self.root / "socket"))

    def path(self, name: str) -> str:
        """A path on the machine's disk."""
        return str(self.root / "disk" / name)

    def read(self, path: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return Path(path).read_bytes()
        return None

    def publish(self, content: bytes) -> str:
        """Put something where the machine can download it; returns the URL."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/daemon" else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        self._site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._site.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._site.server_address[1]}/daemon"

    async def kill_daemon(self, client: AgentClient) -> None:
        """Kill it as somebody in the machine would: its first output is its number."""
        os.kill(int(await client.daemon_output("stderr")), signal.SIGKILL)

    async def close(self) -> None:
        if self._site is not None:
            await asyncio.to_thread(self._site.shutdown)
            self._site.server_close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@contextlib.asynccontextmanager
async def run_agent(program: Path) -> AsyncIterator[RealAgent]:
    """Run an agent's program until the end of the block."""
    if os.uname().machine != "x86_64":
        pytest.skip("the agent's program is for amd64")
    with tempfile.TemporaryDirectory(prefix="fuse-agent-") as name:
        root = Path(name)
        (root / "fuse").mkdir(mode=0o700)
        environment = {"FUSED_FOLDER": str(root / "fuse"), "PATH": os.environ["PATH"]}
        process = await asyncio.create_subprocess_exec(program, "serve", "--unix", root / "socket", env=environment)
        agent = RealAgent(root, process)
        try:
            async with asyncio.timeout(60):
                while not await _listens(root / "socket"):
                    assert process.returncode is None
                    await asyncio.sleep(0.01)
            yield agent
        finally:
            await agent.close()


async def _listens(path: Path) -> bool:
    try:
        stream = await open_unix(str(path))
    except OSError:
        return False
    await stream.close()
    return True
