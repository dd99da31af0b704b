"""The composition root of the control plane: what is made of what, in which order, and how it ends.

Order at the end: streams and waits first (`closing`), then requests under way, then watchers, then the worker, whose
leases are given back so that the next process goes on at once, then the store.
"""

import asyncio
import contextlib
import datetime as dt
import errno
import logging
import os
import pwd
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

import fusevm
from fusevm.control.app import build_app
from fusevm.control.clock import Clock, DatabaseClock, SystemClock
from fusevm.control.collector import Collector
from fusevm.control.command_log import CommandLog
from fusevm.control.config import ControlConfig, check, effective_listen, parse_listen
from fusevm.control.dial import Endpoint
from fusevm.control.directory import Directory
from fusevm.control.entry import Entry
from fusevm.control.fleet_gauges import Fleet
from fusevm.control.host_api import HostApi
from fusevm.control.host_client import HttpHost
from fusevm.control.metrics import Metrics
from fusevm.control.performer import Performer
from fusevm.control.plane import Plane
from fusevm.control.queue import Queue
from fusevm.control.secrets import open_sealer, reseal_all
from fusevm.control.signals import Signals
from fusevm.control.store.location import MEMORY, is_postgres, sqlite_path
from fusevm.control.store.opening import open_store
from fusevm.control.store.protocol import Claim, Committed, Store
from fusevm.control.tls import check_pair, reload_pair
from fusevm.control.vault import Vault
from fusevm.control.watcher import Around, Watchers
from fusevm.control.worker import Worker
from fusevm.model.errors import BadSetting, PortInUse
from fusevm.wire.frames import HEADER, MAX_PAYLOAD
from fusevm.wire.http_protocol import LimitedHttp
from fusevm.wire.journald import choose_output

log = structlog.get_logger()

#: Longest wait at start for the first answers of the hosts.
FIRST_LOOK_S = 5.0
UPKEEP_S = 600.0
#: The store's writer asks for the interpreter several times per transaction; at Python's 5 ms it would mostly wait.
SWITCH_S = 0.0005
PURGE_BATCH = 500
BACKLOG = 2048


# -- the plane -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_plane(
    config: ControlConfig,
    *,
    clock: Clock | None = None,
    clients: Mapping[str, HostApi] | None = None,
    store: Store | None = None,
    dial: Callable[[Endpoint], HostApi] = HttpHost,
    entropy: Callable[[int], bytes] = secrets.token_bytes,
) -> AsyncIterator[Plane]:
    """A working control plane without its HTTP server. `clients` replaces the way to hosts of these ids.

    `store`, `dial` and `entropy` replace the database, the way to all hosts and the source of ids: for simulations. The
    store is closed at the end.
    """
    own_clock = clock or SystemClock()
    metrics, signals = Metrics(), Signals()
    async with contextlib.AsyncExitStack() as stack:
        sealer = open_sealer(config)
        if store is None:
            store = await open_store(
                config.database, config.policy, own_clock.now_ms, pool_size=config.database_pool, meter=metrics
            )
        stack.push_async_callback(store.close)
        clock = DatabaseClock(own_clock)
        await clock.follow(store.now_ms)
        directory = Directory(store, sealer, clock, fusevm.__version__, dial)
        stack.push_async_callback(directory.close)
        for host_id, client in (clients or {}).items():
            directory.put(host_id, client)
        await directory.register(config.hosts)
        claim = Claim(f"w-{os.getpid()}-{secrets.token_hex(8)}", round(config.lease_s * 1000))
        entry = Entry(store, signals, config.policy, clock, claim, entropy)
        vault = Vault(store, sealer)
        performer = Performer(directory.client, vault, entry, cluster=store.cluster, database_ms=store.now_ms)
        collector = Collector(store, directory.client, cluster=store.cluster, claim=claim, metrics=metrics)
        queue = Queue(store, entry, config.policy, clock=clock, metrics=metrics, poll_s=config.poll_s)
        worker = Worker(
            store,
            entry,
            performer,
            collector,
            claim=claim,
            clock=clock,
            metrics=metrics,
            poll_s=config.poll_s,
        )
        around = Around(
            store=store,
            entry=entry,
            cluster=store.cluster,
            policy=config.policy,
            claim=claim,
            clock=clock,
            metrics=metrics,
            pace=config,
            vault=vault,
        )
        watchers = Watchers(directory.client, around)
        store.listener = _spread(signals, worker, queue, metrics)
        store.waker = signals.wake
        store.doubter = _doubting(metrics)
        plane = Plane(
            config=config,
            version=fusevm.__version__,
            clock=clock,
            store=store,
            signals=signals,
            entry=entry,
            directory=directory,
            vault=vault,
            collector=collector,
            commands=CommandLog(entry, metrics),
            sealer=sealer,
            metrics=metrics,
            fleet=Fleet(store, clock),
        )
        async with _at_work(plane, worker, watchers, queue):
            yield plane


def _spread(signals: Signals, worker: Worker, queue: Queue, metrics: Metrics) -> Callable[[Committed], None]:
    def listener(committed: Committed) -> None:
        worker.notice(committed.record, committed.leased_to)
        queue.notice(committed.record)
        signals.publish(committed.record)
        metrics.committed(committed.record)

    return listener


def _doubting(metrics: Metrics) -> Callable[[frozenset[str]], None]:
    def doubter(uids: frozenset[str]) -> None:
        metrics.loop_failures.labels("list").inc()
        log.error("records_unreadable", uids=sorted(uids), hint="see `fuse db check`")

    return doubter


@contextlib.asynccontextmanager
async def _at_work(plane: Plane, worker: Worker, watchers: Watchers, queue: Queue) -> AsyncIterator[None]:
    """Worker, watchers, queue and upkeep run within the block."""
    async with asyncio.TaskGroup() as group:
        working = group.create_task(worker.run())
        others = [
            group.create_task(work) for work in (watchers.run(), queue.run(), plane.commands.run(), _upkeep(plane))
        ]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LOOK_S):
                    await watchers.ready.wait()
            yield
        finally:
            close_streams(plane)
            for task in others:
                task.cancel()
            worker.stop()
            await asyncio.wait([working, *others])
            await plane.commands.close()


async def _upkeep(plane: Plane) -> None:
    """Delete what is kept long enough; seal with the present key what is sealed with another one."""
    keep_ms = round(plane.config.retention_s * 1000)
    while True:
        try:
            while await plane.store.purge(keep_ms, PURGE_BATCH) == PURGE_BATCH:
                pass
            while await plane.store.prune_events(keep_ms, PURGE_BATCH) >= PURGE_BATCH:
                pass
            await reseal_all(plane.store, plane.sealer)
        except Exception:  # loop boundary: it is tried again
            plane.metrics.loop_failures.labels("upkeep").inc()
            log.exception("upkeep_failed")
        await asyncio.sleep(UPKEEP_S)


def close_streams(plane: Plane) -> None:
    """Begin to close: event streams, sockets and waits end."""
    plane.closing.set()
    plane.signals.wake_all()


# -- the server ----------------------------------------------------------------------------------------------------


class _LateApp:
    """Stands for the application until there is one, so that the server is loaded before privileges are dropped."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is None:
            raise RuntimeError("the application is not there yet")
        await self.app(scope, receive, send)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process before the store is closed."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


def server_config(config: ControlConfig, app: ASGIApp) -> uvicorn.Config:
    """How HTTP is served."""
    return uvicorn.Config(
        app,
        http=LimitedHttp,
        ws="websockets-sansio",
        ws_max_size=HEADER.size + MAX_PAYLOAD,
        ws_per_message_deflate=False,
        # A reader that pauses answers no ping, and its session must live; TCP tells us of dead peers.
        ws_ping_interval=None,
        ws_ping_timeout=None,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(config.shutdown_s)),
        backlog=BACKLOG,
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
    )


async def run_server(plane: Plane, server: HttpServer, listener: socket.socket, stop: asyncio.Event) -> None:
    """Serve until `stop`; then close streams, let requests finish, and return."""
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve([listener]))
        stopping = group.create_task(stop.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            close_streams(plane)
            server.should_exit = True
            stopping.cancel()


def bind(config: ControlConfig) -> socket.socket:
    """The listening socket. Raises PortInUse, BadSetting."""
    address = effective_listen(config)
    host, port = parse_listen(address)
    try:
        listener = _listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(address=address, setting="--listen") from error
        raise BadSetting(setting="listen", problem=f"cannot listen on {address}: {error.strerror}") from error
    # Accepted connections inherit it. asyncio sets it only where a socket names its protocol; without it, the body of
    # an answer waits up to 40 ms until the client has acknowledged the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _listen(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def base_url(config: ControlConfig, listener: socket.socket) -> str:
    """A URL under which this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    local = {"::": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound
    shown = f"[{local}]" if ":" in local else local
    return f"{'https' if config.tls_cert else 'http'}://{shown}:{port}"


def drop_privileges(uid: int | None) -> None:
    """Become `uid` for good, when we are root."""
    if uid is None or uid == 0 or os.geteuid() != 0:
        return
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        gid, name = uid, ""
    else:
        gid, name = entry.pw_gid, entry.pw_name
    os.initgroups(name, gid) if name else os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def prepare_directory(path: str, uid: int | None) -> None:
    """Make the directory of an SQLite file if it is missing, owned by whom we shall be. Raises BadSetting."""
    directory = Path(path).absolute().parent
    if path == MEMORY or directory.exists():
        return
    try:
        directory.mkdir(parents=True, mode=0o700)
        if uid is not None and os.geteuid() == 0:
            os.chown(directory, uid, -1)
    except OSError as error:
        raise BadSetting(setting="database", problem=f"cannot make {directory}: {error.strerror}") from error


def serve(config: ControlConfig) -> int:
    """Run a control plane until SIGTERM or SIGINT; the exit status. Raises Error before anything is touched."""
    check(config)
    configure_logs(config)
    sys.setswitchinterval(SWITCH_S)
    late = _LateApp()
    if not is_postgres(config.database):
        prepare_directory(sqlite_path(config.database), config.drop_to_uid)
    if config.tls_cert:
        check_pair(config.tls_cert, config.tls_key, dt.datetime.now(dt.UTC))
    settings = server_config(config, late)
    settings.load()
    listener = bind(config)
    with listener:
        drop_privileges(config.drop_to_uid)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, settings, late, listener))
    return 0


async def _serve(config: ControlConfig, settings: uvicorn.Config, late: _LateApp, listener: socket.socket) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if settings.ssl is not None:
        loop.add_signal_handler(signal.SIGHUP, reload_pair, settings.ssl, config)
    async with open_plane(config) as plane:
        late.app = build_app(plane)
        server = HttpServer(settings)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_server(plane, server, listener, stop))
            await server.up.wait()
            announce(config, base_url(config, listener))


def announce(config: ControlConfig, url: str) -> None:
    """Tell people and programs that requests are served."""
    if config.ready_file:
        path = Path(config.ready_file)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(url + "\n")
        fresh.replace(path)
    sys.stdout.write(f"fuse control plane {fusevm.__version__} at {url}\n")
    sys.stdout.flush()


def configure_logs(config: ControlConfig) -> None:
    """Structured lines on standard error."""
    level = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    renderer = structlog.processors.JSONRenderer() if config.log_json else structlog.dev.ConsoleRenderer(colors=False)
    last, factory = choose_output(renderer, structlog.PrintLoggerFactory(sys.stderr), "fuse-control", os.environ)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level[config.log_level]),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    # Whatever ends an answer is logged by the edge, once.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
