"""A small API server for tests of clients: real HTTP and WebSockets on loopback, commands run on this machine.

Answers can be scripted (`script`); everything else behaves like the public API, with a folder as the machine's disk.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import inspect
import os
import pty
import signal
import socket
import struct
import subprocess
import tarfile
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from fusevm.model import errors
from fusevm.wire.errors import render_envelope, render_flat
from fusevm.wire.frames import Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest, Exit, FileEntry
from fusevm.wire.rest import (
    EgressBody,
    EnvironmentBody,
    EventBody,
    ExecAnswer,
    HostBody,
    NetworkBody,
    SpecBody,
    TimingsBody,
)

TOKEN = "test-token"
NOW = "2026-01-02T03:04:05Z"


#: Scripted in place of an answer: the connection is cut.
CUT = Response()


def with_cutting(app: Any) -> Any:
    """Give handlers a way to cut their connection."""

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["cut"] = send.__self__.transport.abort
        await app(scope, receive, send)

    return outer


def make_environment(task_id: str, state: str = "running", **more: Any) -> EnvironmentBody:
    return EnvironmentBody(
        id=f"fuse-{task_id}",
        uid=f"01uid{task_id}",
        state=state,
        task_id=task_id,
        host_id="default",
        url="",
        spec=SpecBody(cpus=1, ram_mb=512, storage_gb=4, image="debian-12", max_runtime_seconds=7200),
        network=NetworkBody(),
        egress=EgressBody(),
        created_at=NOW,
        updated_at=NOW,
        timings=TimingsBody(schedule_ms=1, prepare_ms=2, boot_ms=3, agent_ms=4, host_ms=10),
        **more,
    )


class FakeApi:
    """State of the fake and its server thread."""

    def __init__(self, disk: Path) -> None:
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self.reset(disk)

    def reset(self, disk: Path) -> None:
        """Forget everything that tests did."""
        self.disk = disk
        self.environments: dict[str, EnvironmentBody] = {}
        self.ended: dict[str, EnvironmentBody] = {}
        self.hosts = [HostBody(id="default", url="http://127.0.0.1:8090", state="active", health="ok", driver="qemu")]
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.commands: list[ExecRequest] = []
        #: Entrypoint and command of every image.
        self.image_command: list[str] = []
        self.signals: list[str] = []
        self.events: list[EventBody] = []
        self.log = b"line one\nline two\n"
        #: (method, path prefix) -> answers to give once each before the real ones.
        self.scripts: dict[tuple[str, str], list[Callable[[], Any]]] = {}
        self.token = TOKEN

    # -- control by tests ----------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def script(self, method: str, path: str, answer: Callable[[], Any] | errors.Error, times: int = 1) -> None:
        make = answer if callable(answer) else (lambda: fail(answer))
        self.scripts.setdefault((method, path), []).extend([make] * times)

    def add(self, task_id: str, state: str = "running", **more: Any) -> EnvironmentBody:
        environment = make_environment(task_id, state, **more)
        self.environments[environment.id] = environment
        return environment

    def start(self, certificate: Path | None = None) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        config = uvicorn.Config(
            with_cutting(self._app()),
            log_level="critical",
            lifespan="off",
            ws_ping_timeout=None,
            timeout_graceful_shutdown=1,
            ssl_certfile=certificate,
            ssl_keyfile=certificate,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            self._thread.join(120)

    # -- the server ----------------------------------------------------------------------------------------------

    def _app(self) -> Starlette:
        env = "/v1/environments/{id}"
        return Starlette(
            routes=[
                Route("/ready", self._wrap(self.ready)),
                Route("/v1/version", self._wrap(self.version)),
                Route("/v1/hosts", self._wrap(self.list_hosts)),
                Route("/v1/hosts/{id}", self._wrap(self.get_host)),
                Route("/v1/environments", self._wrap(self.collection), methods=["GET", "POST"]),
                Route(env, self._wrap(self.one), methods=["GET", "POST", "DELETE"]),
                Route(env + "/events", self._wrap(self.stream_events)),
                Route(env + "/logs", self._wrap(self.logs)),
                Route(env + "/files", self._wrap(self.files), methods=["GET", "PUT", "POST", "DELETE"]),
                Route(env + "/archive", self._wrap(self.archive), methods=["GET", "PUT"]),
                WebSocketRoute(env + "/exec", self.exec_socket),
                WebSocketRoute(env + "/shell", self.shell_socket),
            ]
        )

    def _wrap(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            is_upload = request.method == "PUT"
            body = b"" if is_upload else await request.body()
            target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            self.requests.append((request.method, target, dict(request.headers), body))
            try:
                for (method, path), answers in self.scripts.items():
                    if answers and request.method == method and target.startswith(path):
                        answer = answers.pop(0)()
                        if inspect.isawaitable(answer):
                            answer = await answer
                        if answer is CUT:
                            request.scope["cut"]()
                        return answer
                if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                    is_open = request.url.path in ("/ready", "/v1/version")
                    if not is_open:
                        return fail(errors.Unauthorized(problem="The token is wrong"))
                done: Response = await handler(request)
            except errors.Error as error:
                return fail(error)
            return done

        return handle

    async def ready(self, request: Request) -> Response:
        return to_json({"status": "ready", "checks": {"state_store": "ok", "fleet": "1 of 1 answer"}})

    async def version(self, request: Request) -> Response:
        return to_json({"service": "fuse-orchestrator", "version": "9.9.9", "api": "v1"})

    async def list_hosts(self, request: Request) -> Response:
        return to_json({"hosts": self.hosts})

    async def get_host(self, request: Request) -> Response:
        for host in self.hosts:
            if host.id == request.path_params["id"]:
                return to_json(host)
        raise errors.HostNotFound(id=request.path_params["id"])

    async def collection(self, request: Request) -> Response:
        if request.method == "POST":
            return self._create(request, await request.body())
        query = request.query_params
        source = self.ended if query.get("ended") == "true" else self.environments
        found = [
            env
            for env in source.values()
            if all(getattr(env, name) == query[name] for name in ("state", "task_id", "host_id") if name in query)
        ]
        start, limit = int(query.get("cursor", "0")), int(query.get("limit", "50"))
        page: dict[str, Any] = {"environments": found[start : start + limit]}
        if start + limit < len(found):
            page["next_cursor"] = str(start + limit)
        return to_json(page)

    def _create(self, request: Request, body: bytes) -> Response:
        task_id = msgspec.json.decode(body)["task_id"]
        if f"fuse-{task_id}" in self.environments:
            raise errors.TaskExists(id=f"fuse-{task_id}", state="running")
        return to_json(self.add(task_id), 201)

    def _find(self, request: Request) -> EnvironmentBody:
        env_id = request.path_params["id"]
        uid = request.query_params.get("uid")
        for env in [*self.environments.values(), *self.ended.values()]:
            if uid and env.uid == uid:
                return env
        if env_id not in self.environments:
            raise errors.EnvironmentNotFound(id=env_id)
        return self.environments[env_id]

    async def one(self, request: Request) -> Response:
        env = self._find(request)
        if request.method == "DELETE":
            del self.environments[env.id]
            self.ended[env.uid] = msgspec.structs.replace(env, state="destroyed", reason="deleted")
            return Response(status_code=204)
        if request.method == "GET":
            return to_json(env)
        if request.query_params.get("action") == "drain":
            self.environments[env.id] = msgspec.structs.replace(env, state="draining")
            return to_json(self.environments[env.id])
        body = msgspec.json.decode(await request.body())
        argv = body.get("cmd") or ["sh", "-c", body["shell"]]
        stdin = base64.b64decode(body.get("stdin_b64", ""))
        done = await asyncio.to_thread(subprocess.run, argv, input=stdin, capture_output=True, check=False)
        answer = ExecAnswer(
            exit_code=done.returncode,
            stdout=done.stdout.decode("utf-8", "replace"),
            stderr=done.stderr.decode("utf-8", "replace"),
        )
        if body.get("encoding") == "base64":
            answer = msgspec.structs.replace(answer, stdout_b64=base64.b64encode(done.stdout).decode())
        return to_json(answer)

    async def stream_events(self, request: Request) -> Response:
        self._find(request)

        async def messages() -> Any:
            yield b": keepalive\n\n"
            for event in self.events:
                yield (
                    (f"id: {event.id}\n" if event.id else "").encode()
                    + b"data: "
                    + msgspec.json.encode(event)
                    + b"\n\n"
                )

        return StreamingResponse(messages(), media_type="text/event-stream")

    async def logs(self, request: Request) -> Response:
        self._find(request)
        return Response(self.log, media_type="text/plain")

    # -- files ---------------------------------------------------------------------------------------------------

    def _path(self, text: str) -> Path:
        return self.disk / text.lstrip("/")

    async def files(self, request: Request) -> Response:
        self._find(request)
        if request.method == "POST":
            return self._file_op(request.query_params["op"], msgspec.json.decode(await request.body()))
        name = request.query_params["path"]
        path = self._path(name)
        if request.method == "PUT":
            return await self._put_file(request, name, path)
        if not path.exists():
            raise errors.FileNotFound(path=name)
        if path.is_dir():
            raise errors.IsADirectory(path=name)
        if request.method == "DELETE":
            path.unlink()
            return Response(status_code=204)
        data = path.read_bytes()
        mode = format(path.stat().st_mode & 0o7777, "04o")
        return Response(data, media_type="application/octet-stream", headers={"x-fuse-mode": mode})

    async def _put_file(self, request: Request, name: str, path: Path) -> Response:
        if request.query_params.get("mkdirs") == "true":
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise errors.IsADirectory(path=name)
        partial, digest, size = path.with_name(path.name + ".part"), hashlib.sha256(), 0
        with partial.open("wb") as file:
            async for chunk in request.stream():
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        partial.chmod(int(request.query_params.get("mode", "0644"), 8))
        partial.rename(path)
        return to_json({"path": name, "size_bytes": size, "sha256": digest.hexdigest()})

    def _file_op(self, op: str, body: dict[str, Any]) -> Response:
        path = self._path(body["path"])
        if op == "mkdir":
            path.mkdir(parents=body.get("parents", True), exist_ok=True)
        if not path.exists() and not path.is_symlink():
            raise errors.FileNotFound(path=body["path"])
        if op == "list":
            return to_json({"entries": [entry_of(child, self.disk) for child in sorted(path.iterdir())]})
        if op == "move":
            path = path.rename(self._path(body["to"]))
        return to_json(entry_of(path, self.disk))

    async def archive(self, request: Request) -> Response:
        self._find(request)
        name = request.query_params["path"]
        path = self._path(name)
        if not path.exists():
            raise errors.FileNotFound(path=name)
        with tempfile.TemporaryFile() as file:
            if request.method == "PUT":
                async for chunk in request.stream():
                    file.write(chunk)
                file.seek(0)
                with tarfile.open(fileobj=file) as tar:
                    members = tar.getmembers()
                    tar.extractall(path)
                return to_json({"entries": len(members), "bytes": sum(member.size for member in members)})
            with tarfile.open(fileobj=file, mode="w") as tar:
                tar.add(path, arcname=path.name)
            file.seek(0)
            return Response(file.read(), media_type="application/x-tar")

    # -- interactive commands --------------------------------------------------------------------------------------

    async def exec_socket(self, socket: WebSocket) -> None:
        if not await self._accept(socket):
            return
        start = decode_message(await socket.receive_bytes())
        assert start.type is FrameType.START
        await self._converse(socket, msgspec.json.decode(start.payload, type=ExecRequest))

    async def shell_socket(self, socket: WebSocket) -> None:
        if not await self._accept(socket):
            return
        query = socket.query_params
        cmd = query.getlist("cmd") or ["/bin/bash", "--norc", "-i"]
        rows, cols = int(query.get("rows", "24")), int(query.get("cols", "80"))
        await self._converse(socket, ExecRequest(cmd=cmd, tty=True, rows=rows, cols=cols))

    async def _accept(self, socket: WebSocket) -> bool:
        self.requests.append(("WS", str(socket.url.path), dict(socket.headers), b""))
        error: errors.Error | None = None
        if socket.headers.get("authorization") != f"Bearer {self.token}":
            error = errors.Unauthorized(problem="The token is wrong")
        elif socket.path_params["id"] not in self.environments:
            error = errors.EnvironmentNotFound(id=socket.path_params["id"])
        if error is not None:
            await socket.send_denial_response(fail(error))
            return False
        await socket.accept()
        return True

    async def _converse(self, socket: WebSocket, request: ExecRequest) -> None:
        self.commands.append(request)
        if request.image_command:
            if not self.image_command:
                unfit = errors.BadRequest(field="image_command")
                await socket.send_bytes(encode_frame(Frame(FrameType.ERROR, render_flat(unfit))))
                await socket.close()
                return
            request = msgspec.structs.replace(request, cmd=self.image_command)
        command = Command(request)
        try:
            command.start()
        except OSError:
            refusal = errors.CommandNotFound(command=request.cmd[0])
            await socket.send_bytes(encode_frame(Frame(FrameType.ERROR, render_flat(refusal))))
            await socket.close()
            return
        await send_json(socket, FrameType.STARTED, {"pid": command.pid})
        reading = asyncio.create_task(self._take_input(socket, command))
        try:
            await asyncio.gather(*(self._give_output(socket, kind, fd) for kind, fd in command.outputs))
            code = await asyncio.to_thread(command.process.wait)
            await send_json(socket, FrameType.EXIT, Exit(exit_code=128 - code if code < 0 else code))
            await socket.close()
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            command.end()

    async def _give_output(self, socket: WebSocket, kind: FrameType, fd: int) -> None:
        while True:
            try:
                data = await asyncio.to_thread(os.read, fd, 65536)
            except OSError:
                return
            if not data:
                return
            await socket.send_bytes(encode_frame(Frame(kind, data)))

    async def _take_input(self, socket: WebSocket, command: Command) -> None:
        try:
            while True:
                frame = decode_message(await socket.receive_bytes())
                match frame.type:
                    case FrameType.STDIN:
                        await asyncio.to_thread(write_all, command.stdin, frame.payload)
                    case FrameType.STDIN_EOF:
                        command.close_stdin()
                    case FrameType.RESIZE:
                        size = msgspec.json.decode(frame.payload)
                        command.resize(size["rows"], size["cols"])
                    case FrameType.SIGNAL:
                        name = msgspec.json.decode(frame.payload)["signal"]
                        self.signals.append(name)
                        command.signal(name)
                    case _:
                        pass
        except (WebSocketDisconnect, OSError):
            command.end()


class Command:
    """A local process that stands for one in a machine."""

    def __init__(self, request: ExecRequest) -> None:
        self.request = request

    def start(self) -> None:
        argv = self.request.cmd or ["/bin/sh", "-c", self.request.shell]
        env = {"PATH": os.environ["PATH"], "TERM": "xterm", "HOME": "/", "PS1": "$ "} | self.request.env
        options: dict[str, Any] = {"env": env, "cwd": self.request.cwd or None, "start_new_session": True}
        if self.request.tty:
            self.master, slave = pty.openpty()
            self.resize(self.request.rows, self.request.cols)
            self.process = subprocess.Popen(
                argv,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                preexec_fn=take_terminal,  # noqa: PLW1509 - the child does one ioctl
                **options,
            )
            os.close(slave)
            self.stdin, self.outputs = self.master, [(FrameType.STDOUT, self.master)]
        else:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, **options)
            assert self.process.stdin
            assert self.process.stdout
            assert self.process.stderr
            self.stdin = self.process.stdin.fileno()
            self.outputs = [
                (FrameType.STDOUT, self.process.stdout.fileno()),
                (FrameType.STDERR, self.process.stderr.fileno()),
            ]
        self.pid = self.process.pid

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        with contextlib.suppress(AttributeError, OSError):
            os.killpg(os.tcgetpgrp(self.master), signal.SIGWINCH)

    def signal(self, name: str) -> None:
        group = os.tcgetpgrp(self.master) if self.request.tty else self.process.pid
        os.killpg(group, getattr(signal, f"SIG{name}"))

    def close_stdin(self) -> None:
        if not self.request.tty and self.process.stdin:
            self.process.stdin.close()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        if self.request.tty and self.master >= 0:
            os.close(self.master)
            self.master = -1


def take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


async def send_json(socket: WebSocket, kind: FrameType, value: Any) -> None:
    await socket.send_bytes(encode_frame(Frame(kind, msgspec.json.encode(value))))


def entry_of(path: Path, disk: Path) -> FileEntry:
    info = path.lstat()
    kind: Any = "symlink" if path.is_symlink() else "directory" if path.is_dir() else "file"
    return FileEntry(
        path="/" + str(path.relative_to(disk)),
        name=path.name,
        type=kind,
        size_bytes=info.st_size,
        mode=format(info.st_mode & 0o7777, "04o"),
    )


def to_json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def fail(error: errors.Error) -> Response:
    headers = {"x-request-id": "req_test"}
    return Response(render_envelope(error), status_code=error.status, media_type="application/json", headers=headers)


@contextlib.contextmanager
def running(disk: Path, certificate: Path | None = None) -> Iterator[FakeApi]:
    api = FakeApi(disk)
    api.start(certificate)
    try:
        yield api
    finally:
        api.stop()
