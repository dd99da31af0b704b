"""What is asked at random, as processes of their own: a control plane with any settings, and the real host daemon in
front of fake machines, in which commands, files, archives and processes work. Both end with SIGTERM.
"""

import asyncio
import signal
import sys
from pathlib import Path

import msgspec
from msgspec.structs import replace

from fusevm.control.config import ControlConfig
from fusevm.control.main import serve as serve_control
from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.config import Listen
from fusevm.host.listeners import bind_tcp, serving
from fusevm.host.tls import ensure_identity, make_ssl_context
from fusevm.testing.host_world import World

PLENTY = 1 << 40


async def _serve_machines(folder: Path) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    world = World(folder)
    limits = world.quarters.limits_now
    world.quarters.limits_now = replace(limits, max_machines=10_000, cpus=PLENTY, memory_mib=PLENTY, disk_bytes=PLENTY)
    async with world.daemon() as daemon:
        identity = ensure_identity(folder)
        listener = bind_tcp(Listen(host="127.0.0.1", port=0))
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        app = Boundary(make_router(daemon), daemon.metrics, secret=identity.secret)
        async with serving(listener, app, make_ssl_context(identity)):
            (folder / "ready.new").write_text(f"{url} {identity.token}")
            (folder / "ready.new").rename(folder / "ready")
            await ended.wait()
            daemon.events.close()


def control(settings: str) -> None:
    """Serve with a ControlConfig as JSON."""
    sys.exit(serve_control(msgspec.json.decode(settings, type=ControlConfig)))


def machines(folder: str) -> None:
    """Serve, and write `URL TOKEN` into `FOLDER/ready`."""
    asyncio.run(_serve_machines(Path(folder)))
