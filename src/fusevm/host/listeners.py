"""The sockets of the API, bound by the daemon itself, and the HTTP servers on them.

The Unix socket is made under umask 077 in a directory of its own and renamed into place, so that at no moment anybody
but root can connect. uvicorn is handed listening sockets; it binds nothing and handles no signals.

Owns: sockets and servers. Must not: know routes or tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fusevm.host.config import SOCKET_PATH_LIMIT, Listen, default_run_dir
from fusevm.host.name_lock import name_lock
from fusevm.model.errors import BadSetting, PathTooLong, PortInUse
from fusevm.wire.frames import HEADER, MAX_PAYLOAD
from fusevm.wire.http_protocol import LimitedHostHttp

_BACKLOG = 1024
#: Open requests may end in order for this long when the daemon stops.
_GRACE_S = 5
#: Idle connections; clients let go of theirs earlier.
_KEEP_ALIVE_S = 30
#: A peer that vanished without a word is noticed after about two minutes (tcp(7)).
_KEEPALIVE_OPTIONS = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3))


def bind_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket that only our user may connect to, in place of one that a dead daemon left.

    The caller holds the lock of the data directory: nobody else listens. Raises PathTooLong.
    """
    temporary = path.with_name(f"{path.name}.new")
    if len(os.fsencode(temporary)) > SOCKET_PATH_LIMIT:
        raise PathTooLong(path=str(path), limit=SOCKET_PATH_LIMIT - len(".new"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with _umask(0o077):
            sock.bind(str(temporary))
        sock.listen(_BACKLOG)
        temporary.replace(path)
    except BaseException:
        sock.close()
        temporary.unlink(missing_ok=True)
        raise
    return sock


def bind_tcp(listen: Listen) -> socket.socket:
    """Listen on TCP. Raises PortInUse, BadSetting."""
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise BadSetting(setting="listen", problem=f"{listen.host} is no address of this host ({e})") from e
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE_OPTIONS:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as e:
        sock.close()
        raise PortInUse(address=f"{listen.host}:{listen.port}", setting="--listen") from e
    return sock


@contextmanager
def lock_instance(instance: str) -> Iterator[None]:
    """Hold the instance's name for our user, whatever directories it was given. Raises PortInUse, BadSetting."""
    path = find_instance_lock(instance)
    with contextlib.ExitStack() as stack:
        with _refusing():
            is_ours = stack.enter_context(name_lock(path))
        if not is_ours:
            raise PortInUse(address=f"instance {instance!r}", setting="--instance")
        yield


@contextmanager
def _refusing() -> Iterator[None]:
    """Where a file cannot be made, the name of the instance is the setting that decides."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as e:
        raise BadSetting(setting="instance", problem=f"{e.filename} cannot be made: {e.strerror}") from e


def find_instance_lock(instance: str) -> Path:
    """The file that holds an instance's name: beside its runtime directory; or in it, made and checked, where anybody
    may make a file beside it, as in /tmp. Raises BadSetting.
    """
    directory = default_run_dir(instance)
    with _refusing():
        if not directory.parent.stat().st_mode & stat.S_IWOTH:
            return directory.with_name(f"{directory.name}.lock")
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = directory.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_private or found.st_uid != os.geteuid():
        remedy = "remove it, or let XDG_RUNTIME_DIR name a folder in which only you can write"
        raise BadSetting(setting="instance", problem=f"{directory} is no folder of yours alone; {remedy}")
    return directory / "instance.lock"


@asynccontextmanager
async def serving(sock: socket.socket, app: ASGIApp, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    """Serve an application on a listening socket, from when this is entered until it is left."""
    server = _Server(_configure(app, tls))
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http server")
    try:
        await server.wait_started(task)
        yield
    finally:
        server.should_exit = True
        await asyncio.wait({task})
        task.result()


class _Server(uvicorn.Server):
    """A server whose process somebody else runs."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the composition root's."""
        yield

    async def wait_started(self, task: asyncio.Task[None]) -> None:
        """Wait until connections are accepted; raise what kept it from starting."""
        while not self.started:
            if task.done():
                task.result()
                raise RuntimeError("the HTTP server ended before it began")
            await asyncio.sleep(0)


def _configure(app: ASGIApp, tls: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=LimitedHostHttp,
        ws="websockets-sansio",
        # Exec frames are small or already dense; and compressing what guests send invites trouble.
        ws_per_message_deflate=False,
        ws_max_size=MAX_PAYLOAD + HEADER.size,
        # A client that is not read from (its command does not read) cannot answer pings either.
        ws_ping_interval=None,
        ws_ping_timeout=None,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_context_factory=(lambda _config, _default: tls) if tls is not None else None,
    )


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def remove_socket(path: Path) -> None:
    """Remove our Unix socket. Idempotent."""
    with contextlib.suppress(OSError):
        path.unlink()
