"""WebSockets: exec frames between the client and the machine, message by message, both ways."""

import asyncio
import contextlib

import msgspec
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from fusevm.control.activity import in_use
from fusevm.control.call import Call
from fusevm.control.command_log import SHELL, STREAM
from fusevm.control.host_api import Duplex
from fusevm.control.outcome import fence_of
from fusevm.control.plane import Plane
from fusevm.control.race import first_of
from fusevm.control.resolve import usable_environment
from fusevm.control.standing import keep_checking
from fusevm.model.errors import Error, Unauthorized
from fusevm.wire.decode import UNREADABLE
from fusevm.wire.errors import render_flat
from fusevm.wire.frames import HEADER, BadFrame, Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest, Exit

log = structlog.get_logger()
#: A login shell: bash where the image has it.
LOGIN_SHELL = "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi"
MAX_SIDE = 65_535
#: Messages of a client that wait for the machine: while there is room, a client that goes away is noticed.
READ_AHEAD = 4
#: RFC 6455 section 7.4.1.
NORMAL, GOING_AWAY, PROTOCOL_ERROR, POLICY_VIOLATION, INTERNAL_ERROR = 1000, 1001, 1002, 1008, 1011


async def exec_stream(plane: Plane, call: Call, socket: WebSocket) -> None:
    """The client sends START itself."""
    await _session(plane, call, socket, STREAM, None)


async def shell_stream(plane: Plane, call: Call, socket: WebSocket) -> None:
    """START is ours: a terminal with a login shell, or with the command asked for."""
    cmd = call.connection.query_params.getlist("cmd")
    start = ExecRequest(
        cmd=cmd,
        shell="" if cmd else LOGIN_SHELL,
        tty=True,
        rows=call.integer("rows", 24, least=1, most=MAX_SIDE),
        cols=call.integer("cols", 80, least=1, most=MAX_SIDE),
    )
    frame = encode_frame(Frame(FrameType.START, msgspec.json.encode(start)))
    await _session(plane, call, socket, SHELL, frame)


async def _session(plane: Plane, call: Call, socket: WebSocket, how: str, start: bytes | None) -> None:
    """Connect to the machine first: until then, a refusal is an ordinary answer."""
    env = await usable_environment(plane, call.caller, call.params["id"])
    host = await plane.directory.client(env.host_id)
    machine = _Heard(await host.open_frames(fence_of(plane.store.cluster, env), env.machine_id))
    cause = f"request {call.request_id}"
    try:
        if start is not None:
            await machine.send(start)
        await socket.accept()
        async with in_use(plane, env, cause):
            waiting: asyncio.Queue[bytes] = asyncio.Queue(READ_AHEAD)
            code = await first_of(
                _to_client(socket, machine),
                _from_client(socket, waiting, may_start=start is None),
                _to_machine(waiting, machine),
                _closing(plane),
                keep_checking(plane, call.caller),
            )
        if code:
            await socket.close(code)
    except WebSocketDisconnect:
        pass
    except Unauthorized as error:
        await _refuse(socket, error)
    finally:
        if machine.exit is not None:
            plane.commands.ended(env, how, cause, machine.exit)
        elif machine.is_started:
            plane.commands.cut_off(env, how, cause)
        await machine.close()


class _Heard:
    """A machine's frames, and what they say of the command. Implements `host_api.Duplex`."""

    def __init__(self, machine: Duplex) -> None:
        self._machine = machine
        self.is_started = False
        self.exit: Exit | None = None

    async def send(self, message: bytes) -> None:
        await self._machine.send(message)

    async def receive(self) -> bytes | None:
        message = await self._machine.receive()
        match message[0] if message else None:
            case FrameType.STARTED:
                self.is_started = True
            case FrameType.EXIT if message is not None:
                with contextlib.suppress(*UNREADABLE):
                    self.exit = msgspec.json.decode(message[HEADER.size :], type=Exit)
            case _:
                pass
        return message

    async def close(self) -> None:
        await self._machine.close()


async def _from_client(socket: WebSocket, waiting: asyncio.Queue[bytes], *, may_start: bool) -> int:
    """Frames of the client, checked one by one; 0 when it has gone."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return 0
        try:
            frame = decode_message(message.get("bytes") or b"")
        except BadFrame as error:
            log.info("bad_frame", problem=str(error))
            return PROTOCOL_ERROR
        if may_start or frame.type is not FrameType.START:
            await waiting.put(encode_frame(frame))


async def _to_machine(waiting: asyncio.Queue[bytes], machine: Duplex) -> int:
    """Frames to the machine, at its pace."""
    while True:
        message = await waiting.get()
        try:
            await machine.send(message)
        except Error:
            # The other direction learns why, and tells the client.
            never: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            return await never


async def _to_client(socket: WebSocket, machine: Duplex) -> int:
    """Frames of the machine; its loss becomes an ERROR frame."""
    try:
        while (message := await machine.receive()) is not None:
            await socket.send_bytes(message)
    except Error as error:
        await socket.send_bytes(encode_frame(Frame(FrameType.ERROR, render_flat(error))))
        return INTERNAL_ERROR
    except WebSocketDisconnect:
        return 0
    return NORMAL


async def _refuse(socket: WebSocket, error: Unauthorized) -> None:
    """End a session whose key is good no longer."""
    with contextlib.suppress(WebSocketDisconnect):
        await socket.send_bytes(encode_frame(Frame(FrameType.ERROR, render_flat(error))))
        await socket.close(POLICY_VIOLATION)


async def _closing(plane: Plane) -> int:
    await plane.closing.wait()
    return GOING_AWAY
