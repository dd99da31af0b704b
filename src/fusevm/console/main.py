"""The composition root of the console: its client, its pages, its server, and how they end."""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI
from nicegui import app as pages
from nicegui import ui

from fusevm.console.config import ConsoleConfig, check
from fusevm.console.environment import add_environment_page
from fusevm.console.environments import add_environments_page
from fusevm.console.feed import Feed
from fusevm.console.frame import Console
from fusevm.console.gate import KEY_PARAMETER, Gate
from fusevm.console.hosts import add_hosts_page
from fusevm.model.errors import BadSetting, PortInUse
from fusevm.sdk import AsyncFuse

_STYLE = Path(__file__).with_name("style.css")
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#3451b2"/>'
    '<path d="M11 8h11v4h-7v3h6v4h-6v6h-4z" fill="#fff"/></svg>'
)
#: A tab that lost its connection for longer than this starts anew.
RECONNECT_S = 10.0
#: How long a shutdown waits for requests under way.
SHUTDOWN_S = 3


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling: who started us sees a clean end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            self.up.set()  # whoever waits for the start learns of its failure, too


def serve(config: ConsoleConfig) -> int:
    """Run the console until SIGTERM or SIGINT; the exit status. Raises Error before anything is touched."""
    check(config)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    listener = bind(config)
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, listener))
    return 0


async def _serve(config: ConsoleConfig, listener: socket.socket) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    key = secrets.token_urlsafe(24)
    port = listener.getsockname()[1]
    client = AsyncFuse(config.url, config.token, ca_file=config.ca_file or None, pin_certificate=config.pin_certificate)
    async with client as fuse:
        console = Console(fuse=fuse, feed=Feed(fuse), url=config.url)
        server = HttpServer(server_config(Gate(build_app(console), key, port)))
        async with asyncio.TaskGroup() as group:
            feeding = group.create_task(console.feed.run())
            serving = group.create_task(server.serve([listener]))
            await server.up.wait()
            if not server.started:
                raise RuntimeError("the pages could not be served; the lines above say why")
            announce(config, f"http://{authority(config.host, port)}/?{KEY_PARAMETER}={key}")
            await stop.wait()
            server.should_exit = True
            await serving
            feeding.cancel()


def build_app(console: Console) -> FastAPI:
    """The pages as an application. NiceGUI keeps its pages per process, so this is done once in each."""
    for add_page in (add_environments_page, add_environment_page, add_hosts_page):
        add_page(console)
    pages.colors(primary="#3451b2", negative="#b42318")
    ui.add_css(_STYLE.read_text(), shared=True)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    ui.run_with(
        app,
        title="Fuse",
        favicon=_ICON,
        dark=None,
        tailwind=False,
        reconnect_timeout=RECONNECT_S,
        show_welcome_message=False,
    )
    return app


def server_config(app: Gate) -> uvicorn.Config:
    """How HTTP is served."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


def bind(config: ConsoleConfig) -> socket.socket:
    """The listening socket. Raises PortInUse, BadSetting."""
    shown = authority(config.host, config.port)
    host = "127.0.0.1" if config.host.lower() == "localhost" else config.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, config.port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(address=shown, setting="--listen") from error
        raise BadSetting(setting="--listen", problem=f"cannot listen on {shown}: {error.strerror}") from error


def authority(host: str, port: int) -> str:
    """`host:port` as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def announce(config: ConsoleConfig, address: str) -> None:
    """Tell people and programs where the console is."""
    if config.ready_file:
        path = Path(config.ready_file)
        fresh = path.with_name(path.name + ".new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(address + "\n")
        fresh.replace(path)
    sys.stdout.write(f"Console  {address}\nShows    {config.url}\nCtrl-C ends it\n")
    sys.stdout.flush()
