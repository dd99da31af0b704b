"""The synchronous client.

    with Fuse("http://127.0.0.1:8080", token) as fuse:
        env = fuse.environments.create(image="debian-12")
        print(fuse.environments.exec(env.id, ["uname", "-a"]).stdout)
        fuse.environments.delete(env.id)

Every failure is an error of `fusevm.model.errors` (or `sdk.failures`). Calls that may be repeated are repeated after
lost connections; `sdk.core` says which ones these are. One client may be used by several threads.
"""

import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from fusevm.model.environment import State
from fusevm.model.errors import NotFound, Timeout
from fusevm.sdk import core
from fusevm.sdk.address import Dialer, parse_address
from fusevm.sdk.channel import Channel
from fusevm.sdk.choices import looks, make_key, make_task_id
from fusevm.sdk.core import Argv, CreateFields, LogSource
from fusevm.sdk.files import Archive, Files
from fusevm.sdk.fleet import ApiKeys, Hosts, Snapshots
from fusevm.sdk.processes import Processes
from fusevm.wire.guest import ExecRequest
from fusevm.wire.rest import (
    EnvironmentBody,
    EnvironmentPage,
    EventBody,
    ExecAnswer,
    Ready,
    Version,
)
from fusevm.wire.sse import MessageDecoder

if TYPE_CHECKING:
    from fusevm.sdk.session import Session

DEFAULT_URL = "http://127.0.0.1:8080"
#: Event streams carry a comment every 15 s; three missing ones mean that the stream is dead.
EVENTS_SILENCE_S = 50.0
#: Silence that ends the reading of past events.
PAST_SILENCE_S = 0.5


class Environments:
    """`/v1/environments` and what lies below."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def create(
        self, task_id: str = "", *, deadline_s: float = 300.0, **fields: Unpack[CreateFields]
    ) -> EnvironmentBody:
        """Create an environment and return it once it runs; without a task id it gets a random one.

        Safe against lost answers: one Idempotency-Key covers all tries. Raises Timeout after `deadline_s` beyond the
        time that it may wait for a place (it may then still come up). Where it ends instead, raises why: BootFailed,
        StartupFailed, BootTimeout, EnvironmentEnded ..., whose details name its `uid` and `record`.
        """
        request = core.make_create_request(task_id or make_task_id(), fields)
        created = self._channel.get(core.create_environment(request, key=make_key()))
        return self.wait_until_running(created, deadline_s=deadline_s + fields.get("queue_seconds", 0))

    def begin(self, task_id: str = "", **fields: Unpack[CreateFields]) -> EnvironmentBody:
        """Ask for an environment and return at once, state `provisioning`."""
        request = core.make_create_request(task_id or make_task_id(), fields)
        return self._channel.get(core.create_environment(request, key=make_key(), wait=False))

    def wait_until_running(self, environment: EnvironmentBody, *, deadline_s: float = 300.0) -> EnvironmentBody:
        """Return it when it no longer is `provisioning`. Raises the error of its ending, Timeout."""
        for pause in looks(f"the start of {environment.id}", deadline_s):
            if environment.state != State.PROVISIONING:
                break
            time.sleep(pause)
            environment = self.get(environment.id, uid=environment.uid)
        core.raise_unless_up(environment)
        return environment

    def list(
        self, *, task_id: str = "", state: str = "", host_id: str = "", ended: bool = False
    ) -> Iterator[EnvironmentBody]:
        """All environments that match, page by page as they are taken."""
        cursor = ""
        while True:
            page = self.page(task_id=task_id, state=state, host_id=host_id, ended=ended, limit=200, cursor=cursor)
            yield from page.environments
            cursor = page.next_cursor
            if not cursor:
                return

    def page(
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
        return self._channel.get(call)

    def get(self, env_id: str, *, uid: str = "") -> EnvironmentBody:
        """The live environment, or with `uid` that one, ended or not. Raises EnvironmentNotFound, EnvironmentEnded."""
        return self._channel.get(core.get_environment(env_id, uid=uid))

    def delete(self, env_id: str, *, wait: bool = True, deadline_s: float = 300.0) -> None:
        """Destroy an environment. Returns when it is gone, or with `wait=False` when that is certain to happen."""
        is_gone = self._channel.call(core.delete_environment(env_id, wait=wait))
        if is_gone is not False or not wait:
            return
        for pause in looks(f"destroying {env_id}", deadline_s):
            try:
                self.get(env_id)
            except NotFound:
                return
            time.sleep(pause)

    def drain(self, env_id: str) -> EnvironmentBody:
        """Begin the end: the daemon is drained, and the machine stays for inspection until it is deleted.

        `error` says what went wrong with the drain command, if anything did.
        """
        return self._channel.get(core.drain_environment(env_id))

    def change_network(self, env_id: str, policy: dict[str, Any]) -> EnvironmentBody:
        """Hold a running environment to another network policy (docs/network.md), open connections included.

        Raises BadField for a policy that cannot be held, PolicyNotEnforceable where its host cannot hold it.
        """
        return self._channel.get(core.change_network(env_id, policy))

    def rotate_token(self, env_id: str) -> bool:
        """Give machine and daemon a new token. True: the old one is refused; False: that is still under way.

        Raises DaemonFailed when the daemon does not start with the new one, Timeout when the guest does not answer.
        """
        return self._channel.get(core.rotate_token(env_id, key=make_key()))

    def exec(
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
        """Run a command (`cmd`, or `shell` as text for sh) to its end and return output and exit code.

        `timeout_ms` 0: 60 s, at most 600 s. `core.output_of` gives the output as bytes. For more than 16 MiB of output,
        for live output or longer commands use `exec_stream`.
        """
        body = core.make_exec_body(
            cmd, shell=shell, env=env, cwd=cwd, user=user, timeout_ms=timeout_ms, stdin=stdin, binary=binary
        )
        return self._channel.get(core.exec_environment(env_id, body))

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
    ) -> "Session":
        """Run a command with its streams: input, output as it comes, signals, terminal. `timeout_ms` 0: no limit.

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
        return self._channel.session(core.exec_target(env_id), request)

    def shell(self, env_id: str, cmd: Argv | None = None, *, rows: int = 24, cols: int = 80) -> "Session":
        """Open a terminal with a login shell, or with `cmd`."""
        return self._channel.session(core.shell_target(env_id, rows=rows, cols=cols, cmd=cmd), None)

    def events(self, env_id: str = "", *, uid: str = "", last_event_id: str = "") -> Iterator[EventBody]:
        """The events of one environment (of all with an empty id): first its current state, then each as it happens.

        Ends after the terminal event. With `last_event_id` what was missed comes first. A broken connection raises
        ConnectionLost; go on from the last id seen.
        """
        request = core.watch_events(env_id, uid=uid, last_event_id=last_event_id)
        yield from self._messages(request, EVENTS_SILENCE_S)

    def _messages(self, request: core.Request, silence_s: float) -> Iterator[EventBody]:
        read = core.json_reader(EventBody)
        decoder = MessageDecoder()
        with self._channel.stream(request, silence_s) as response:
            for chunk in response.chunks():
                for message in decoder.feed(chunk):
                    yield read(core.Answer(status=200, body=message.data.encode()))

    def past_events(self, env_id: str, *, uid: str) -> Iterator[EventBody]:
        """What has happened to one environment so far, from its first event."""
        try:
            request = core.watch_events(env_id, uid=uid, last_event_id=core.first_event_id(uid))
            yield from self._messages(request, PAST_SILENCE_S)
        except Timeout:
            return  # a live environment's stream goes on; what is past comes at once

    def logs(self, env_id: str, *, source: LogSource = "console", follow: bool = False) -> Iterator[bytes]:
        """The log of one source in pieces; with `follow` until the environment ends."""
        request = core.read_logs(env_id, source=source, follow=follow)
        with self._channel.stream(request, None if follow else core.QUICK_TIMEOUT_S) as response:
            yield from response.chunks()

    def files(self, env_id: str) -> Files:
        """The files of a machine."""
        return Files(self._channel, env_id)

    def archive(self, env_id: str) -> Archive:
        """Whole folders of a machine, as tar."""
        return Archive(self._channel, env_id)

    def processes(self, env_id: str) -> Processes:
        """The background processes of a machine."""
        return Processes(self._channel, env_id)


class Fuse:
    """A connection to one control plane. Close it, or use it as a context manager."""

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
        self._channel = Channel(dialer, token)
        self.environments = Environments(self._channel)
        self.hosts = Hosts(self._channel)
        self.snapshots = Snapshots(self._channel)
        self.api_keys = ApiKeys(self._channel)

    def version(self) -> Version:
        """What the server is; needs no token."""
        return self._channel.get(core.get_version())

    def ready(self) -> Ready:
        """Whether the server can work, with the checks behind it; needs no token."""
        return self._channel.get(core.get_ready())

    def close(self) -> None:
        """Close idle connections. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
