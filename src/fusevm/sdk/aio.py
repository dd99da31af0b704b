"""The asynchronous client: the twin of `sdk.client`, same names, same errors.

async with AsyncFuse("http://127.0.0.1:8080", token) as fuse:
    env = await fuse.environments.create(image="debian-12")
    async with fuse.environments.exec_stream(env.id, ["make", "test"]) as session:
        async for frame in session.frames():
            ...
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self, Unpack

from fusevm.model.environment import State
from fusevm.model.errors import NotFound
from fusevm.sdk import core
from fusevm.sdk.address import Dialer, parse_address
from fusevm.sdk.aio_channel import AsyncChannel, AsyncStream
from fusevm.sdk.aio_fleet import AsyncApiKeys, AsyncHosts, AsyncSnapshots
from fusevm.sdk.aio_session import AsyncSession, open_session
from fusevm.sdk.choices import looks, make_key, make_task_id
from fusevm.sdk.client import DEFAULT_URL, EVENTS_SILENCE_S
from fusevm.sdk.core import Argv, CreateFields, LogSource
from fusevm.sdk.files import SILENCE_S
from fusevm.wire.guest import ExecRequest, Extracted, FileEntry, FileWritten, Process
from fusevm.wire.rest import (
    EnvironmentBody,
    EnvironmentPage,
    EventBody,
    ExecAnswer,
    Ready,
    Version,
)
from fusevm.wire.sse import MessageDecoder

_Entries = list[FileEntry]
_Processes = list[Process]


class AsyncEnvironments:
    """`/v1/environments` and what lies below."""

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel

    async def create(
        self, task_id: str = "", *, deadline_s: float = 300.0, **fields: Unpack[CreateFields]
    ) -> EnvironmentBody:
        """Create an environment and return it once it runs; see `Environments.create`."""
        request = core.make_create_request(task_id or make_task_id(), fields)
        created = await self._channel.get(core.create_environment(request, key=make_key()))
        return await self.wait_until_running(created, deadline_s=deadline_s + fields.get("queue_seconds", 0))

    async def begin(self, task_id: str = "", **fields: Unpack[CreateFields]) -> EnvironmentBody:
        """Ask for an environment and return at once, state `provisioning`."""
        request = core.make_create_request(task_id or make_task_id(), fields)
        return await self._channel.get(core.create_environment(request, key=make_key(), wait=False))

    async def wait_until_running(self, environment: EnvironmentBody, *, deadline_s: float = 300.0) -> EnvironmentBody:
        """Return it when it no longer is `provisioning`. Raises the error of its ending, Timeout."""
        for pause in looks(f"the start of {environment.id}", deadline_s):
            if environment.state != State.PROVISIONING:
                break
            await asyncio.sleep(pause)
            environment = await self.get(environment.id, uid=environment.uid)
        core.raise_unless_up(environment)
        return environment

    async def list(
        self, *, task_id: str = "", state: str = "", host_id: str = "", ended: bool = False
    ) -> AsyncIterator[EnvironmentBody]:
        """All environments that match, page by page as they are taken."""
        cursor = ""
        while True:
            page = await self.page(task_id=task_id, state=state, host_id=host_id, ended=ended, limit=200, cursor=cursor)
            for environment in page.environments:
                yield environment
            cursor = page.next_cursor
            if not cursor:
                return

    async def page(
        self,
        *,
        task_id: str = "",
        state: str = "",
        host_id: str = "",
        ended: bool = False,
        limit: int | None = None,
        cursor: str = "",
    ) -> EnvironmentPage:
        """One page; `next_cursor` leads to the next one."""
        call = core.list_environments(
            task_id=task_id, state=state, host_id=host_id, ended=ended, limit=limit, cursor=cursor
        )
        return await self._channel.get(call)

    async def get(self, env_id: str, *, uid: str = "") -> EnvironmentBody:
        """The live environment, or with `uid` that one, ended or not. Raises EnvironmentNotFound, EnvironmentEnded."""
        return await self._channel.get(core.get_environment(env_id, uid=uid))

    async def delete(self, env_id: str, *, wait: bool = True, deadline_s: float = 300.0) -> None:
        """Destroy an environment. Returns when it is gone, or with `wait=False` when that is certain to happen."""
        is_gone = await self._channel.call(core.delete_environment(env_id, wait=wait))
        if is_gone is not False or not wait:
            return
        for pause in looks(f"destroying {env_id}", deadline_s):
            try:
                await self.get(env_id)
            except NotFound:
                return
            await asyncio.sleep(pause)

    async def drain(self, env_id: str) -> EnvironmentBody:
        """Begin the end: the daemon is drained, and the machine stays for inspection until it is deleted.

        `error` says what went wrong with the drain command, if anything did.
        """
        return await self._channel.get(core.drain_environment(env_id))

    async def change_network(self, env_id: str, policy: dict[str, Any]) -> EnvironmentBody:
        """Hold a running environment to another network policy (docs/network.md), open connections included.

        Raises BadField for a policy that cannot be held, PolicyNotEnforceable where its host cannot hold it.
        """
        return await self._channel.get(core.change_network(env_id, policy))

    async def rotate_token(self, env_id: str) -> bool:
        """Give machine and daemon a new token. True: the old one is refused; False: that is still under way.

        Raises DaemonFailed when the daemon does not start with the new one, Timeout when the guest does not answer.
        """
        return await self._channel.get(core.rotate_token(env_id, key=make_key()))

    async def exec(
        self,
        env_id: str,
        cmd: Argv | None = None,
        *,
        shell: str = "",
        env: dict[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout_ms: int = 0,
        stdin: bytes = b"",
        binary: bool = False,
    ) -> ExecAnswer:
        """Run a command to its end and return output and exit code; see `Environments.exec`."""
        body = core.make_exec_body(
            cmd, shell=shell, env=env, cwd=cwd, user=user, timeout_ms=timeout_ms, stdin=stdin, binary=binary
        )
        return await self._channel.get(core.exec_environment(env_id, body))

    def exec_stream(
        self,
        env_id: str,
        cmd: Argv | None = None,
        *,
        shell: str = "",
        image_command: bool = False,
        env: dict[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout_ms: int = 0,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Run a command with its streams, within an `async with` block. `timeout_ms` 0: no limit.

        `image_command`: the image's own entrypoint and command, instead of `cmd` and `shell`.
        """
        request = ExecRequest(
            cmd=cmd or [],
            shell=shell,
            image_command=image_command,
            env=env or {},
            cwd=cwd,
            user=user,
            timeout_ms=timeout_ms,
            tty=tty,
            rows=rows,
            cols=cols,
        )
        return open_session(self._channel.dialer, core.exec_target(env_id), self._channel.headers, request)

    def shell(
        self, env_id: str, cmd: Argv | None = None, *, rows: int = 24, cols: int = 80
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Open a terminal with a login shell, or with `cmd`, within an `async with` block."""
        target = core.shell_target(env_id, rows=rows, cols=cols, cmd=cmd)
        return open_session(self._channel.dialer, target, self._channel.headers, None)

    async def events(self, env_id: str = "", *, uid: str = "", last_event_id: str = "") -> AsyncIterator[EventBody]:
        """The events of one environment (of all with an empty id); see `Environments.events`."""
        read = core.json_reader(EventBody)
        request = core.watch_events(env_id, uid=uid, last_event_id=last_event_id)
        async with self._channel.stream(request, EVENTS_SILENCE_S) as stream:
            decoder = MessageDecoder()
            async for chunk in stream.chunks():
                for message in decoder.feed(chunk):
                    yield read(core.Answer(status=200, body=message.data.encode()))

    async def logs(self, env_id: str, *, source: LogSource = "console", follow: bool = False) -> AsyncIterator[bytes]:
        """The log of one source in pieces; with `follow` until the environment ends."""
        request = core.read_logs(env_id, source=source, follow=follow)
        async with self._channel.stream(request, None if follow else core.QUICK_TIMEOUT_S) as stream:
            async for chunk in stream.chunks():
                yield chunk

    def files(self, env_id: str) -> "AsyncFiles":
        """The files of a machine."""
        return AsyncFiles(self._channel, env_id)

    def archive(self, env_id: str) -> "AsyncArchive":
        """Whole folders of a machine, as tar."""
        return AsyncArchive(self._channel, env_id)

    def processes(self, env_id: str) -> "AsyncProcesses":
        """The background processes of a machine."""
        return AsyncProcesses(self._channel, env_id)


class AsyncFiles:
    """`/v1/environments/{id}/files`. Paths are absolute."""

    def __init__(self, channel: AsyncChannel, env_id: str) -> None:
        self._channel = channel
        self._id = env_id

    async def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The contents, or `length` bytes from `offset`."""
        async with self.open(path, offset=offset, length=length) as stream:
            return await stream.read()

    def open(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[AsyncStream]:
        """The contents as a stream, within an `async with` block."""
        request = core.read_file(self._id, path, offset=offset, length=length)
        return self._channel.stream(request, SILENCE_S)

    async def write(
        self, path: str, data: bytes | AsyncIterator[bytes], *, mode: str = "", user: str = "", mkdirs: bool = True
    ) -> FileWritten:
        """Replace a file atomically with bytes, or with pieces as they come."""
        body = data if isinstance(data, bytes) else None
        call = core.write_file(self._id, path, body, mode=mode, user=user, mkdirs=mkdirs)
        return await (self._channel.get(call) if isinstance(data, bytes) else self._channel.put(call, data))

    async def stat(self, path: str) -> FileEntry:
        """What is at a path; links are not followed."""
        return await self._channel.get(core.stat_file(self._id, path))

    async def list(self, path: str) -> _Entries:
        """The entries of a folder, by name."""
        return (await self._channel.get(core.list_files(self._id, path))).entries

    async def mkdir(self, path: str, *, parents: bool = True, mode: str = "0755") -> FileEntry:
        """Make a folder."""
        return await self._channel.get(core.make_directory(self._id, path, parents=parents, mode=mode))

    async def move(self, path: str, to: str) -> FileEntry:
        """Rename."""
        return await self._channel.get(core.move_file(self._id, path, to))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or a folder with its contents."""
        await self._channel.call(core.delete_file(self._id, path, recursive=recursive))


class AsyncArchive:
    """`/v1/environments/{id}/archive`: whole folders as tar."""

    def __init__(self, channel: AsyncChannel, env_id: str) -> None:
        self._channel = channel
        self._id = env_id

    @asynccontextmanager
    async def get(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The pieces of a tar of a file or folder, names relative to its parent."""
        async with self._channel.stream(core.read_archive(self._id, path), SILENCE_S) as stream:
            yield stream.chunks()

    async def put(self, path: str, tar: AsyncIterator[bytes], *, user: str = "") -> Extracted:
        """Extract a tar (or gzip of one) below a folder that exists."""
        return await self._channel.put(core.write_archive(self._id, path, user=user), tar)


class AsyncProcesses:
    """`/v1/environments/{id}/processes`: commands that outlive the connection that started them."""

    def __init__(self, channel: AsyncChannel, env_id: str) -> None:
        self._channel = channel
        self._id = env_id

    async def start(
        self,
        cmd: Argv | None = None,
        *,
        shell: str = "",
        env: dict[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        stdin: bool = False,
    ) -> Process:
        """Start a command; with `stdin` a pipe stays open for `write_stdin`."""
        request = ExecRequest(cmd=cmd or [], shell=shell, env=env or {}, cwd=cwd, user=user, stdin=stdin)
        return await self._channel.get(core.start_process(self._id, request))

    async def list(self) -> _Processes:
        """All that were started by the API, ended ones included."""
        return (await self._channel.get(core.list_processes(self._id))).processes

    async def get(self, pid: int) -> Process:
        """One process."""
        return await self._channel.get(core.get_process(self._id, pid))

    async def output(
        self, pid: int, *, stream: str = "stdout", offset: int | None = None, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """Retained output from an absolute offset (default: the oldest) on; with `follow` until the process ends."""
        request = core.read_output(self._id, pid, stream=stream, offset=offset, follow=follow)
        async with self._channel.stream(request, None if follow else core.QUICK_TIMEOUT_S) as answer:
            async for chunk in answer.chunks():
                yield chunk

    async def signal(self, pid: int, signal: str = "TERM") -> None:
        """Send a signal to a process and its children."""
        await self._channel.call(core.signal_process(self._id, pid, signal))

    async def write_stdin(self, pid: int, data: bytes, *, eof: bool = False) -> None:
        """Append to its input; `eof` closes it afterwards."""
        await self._channel.call(core.write_stdin(self._id, pid, data, eof=eof))


class AsyncFuse:
    """A connection to one control plane, for one event loop. Close it, or use it as a context manager."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        token: str = "",
        *,
        ca_file: str | None = None,
        pin_certificate: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is sent yet.

        `ca_file` holds certificates to trust; with `pin_certificate` it is the server's own, good under any name.
        `environ` (default: the process's) names proxies, which loopback addresses never use.
        """
        dialer = Dialer(
            parse_address(base_url),
            ca_file=ca_file,
            is_pinned=pin_certificate,
            environ=os.environ if environ is None else environ,
        )
        self._channel = AsyncChannel(dialer, token)
        self.environments = AsyncEnvironments(self._channel)
        self.hosts = AsyncHosts(self._channel)
        self.snapshots = AsyncSnapshots(self._channel)
        self.api_keys = AsyncApiKeys(self._channel)

    async def version(self) -> Version:
        """What the server is; needs no token."""
        return await self._channel.get(core.get_version())

    async def ready(self) -> Ready:
        """Whether the server can work, with the checks behind it; needs no token."""
        return await self._channel.get(core.get_ready())

    async def close(self) -> None:
        """Close idle connections. Idempotent."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
