"""`?action=exec`: run a command to its end.

A client that goes away ends the command, unless its request has an Idempotency-Key: then the answer is kept for it.
"""

import base64

import msgspec
from starlette.responses import Response

from fusevm.control.activity import in_use
from fusevm.control.call import Call, reply
from fusevm.control.command_log import EXEC
from fusevm.control.host_api import GuestRequest
from fusevm.control.outcome import fence_of
from fusevm.control.plane import Plane
from fusevm.control.resolve import usable_environment
from fusevm.model.environment import Environment
from fusevm.model.errors import BadField, Internal
from fusevm.wire import rest
from fusevm.wire.decode import UNREADABLE
from fusevm.wire.guest import MAX_OUTPUT_BYTES, ExecRequest, ExecResult

DEFAULT_TIMEOUT_MS, MAX_TIMEOUT_MS = 60_000, 600_000
#: Seconds that the answer may come after the command's own limit.
GRACE_S = 15
#: Two streams as base64, and the rest.
MAX_ANSWER = 2 * MAX_OUTPUT_BYTES * 4 // 3 + (1 << 16)


async def exec_command(plane: Plane, call: Call) -> Response:
    body, _ = await call.json(rest.ExecBody)
    work = _run(plane, call, body, guest_order(body))
    return reply(await (work if call.request_key is not None else call.unless_gone(work)))


async def _run(plane: Plane, call: Call, body: rest.ExecBody, order: ExecRequest) -> rest.ExecAnswer:
    env = await usable_environment(plane, call.caller, call.params["id"])
    cause = f"request {call.request_id}"
    async with in_use(plane, env, cause):
        with plane.commands.noting_loss(env, EXEC, cause):
            result = await _ask(plane, env, order)
        plane.commands.ended(env, EXEC, cause, result)
    return render_result(result, wants_base64=body.encoding == "base64")


async def _ask(plane: Plane, env: Environment, order: ExecRequest) -> ExecResult:
    host = await plane.directory.client(env.host_id)
    request = GuestRequest(
        fence=fence_of(plane.store.cluster, env),
        machine_id=env.machine_id,
        method="POST",
        target="guest/exec",
        headers={"content-type": "application/json"},
        body=msgspec.json.encode(order),
        timeout_s=order.timeout_ms / 1000 + GRACE_S,
    )
    upstream = await host.relay(request)
    try:
        answer = bytearray()
        async for chunk in upstream.chunks():
            answer += chunk
            if len(answer) > MAX_ANSWER:
                raise Internal(problem="the host's answer to a command is longer than agreed")
    finally:
        await upstream.close()
    try:
        return msgspec.json.decode(answer, type=ExecResult)
    except UNREADABLE as error:
        raise Internal(problem=f"the host's answer to a command is unreadable: {error}") from error


def guest_order(body: rest.ExecBody) -> ExecRequest:
    """What the guest agent is asked. Raises BadField."""
    if bool(body.cmd) == bool(body.shell):
        raise BadField(field="cmd", problem="give exactly one of cmd (a list of arguments) and shell (a text)")
    timeout_ms = body.timeout_ms or DEFAULT_TIMEOUT_MS
    if not 0 < timeout_ms <= MAX_TIMEOUT_MS:
        problem = f"{timeout_ms} is not within 1 to {MAX_TIMEOUT_MS}; start a background process for longer work"
        raise BadField(field="timeout_ms", problem=problem)
    if body.stdin_b64 is not None:
        try:
            base64.b64decode(body.stdin_b64, validate=True)
        except ValueError as error:  # not base64, or not even ASCII
            raise BadField(field="stdin_b64", problem=f"this is not base64: {error}") from error
    return ExecRequest(
        cmd=body.cmd or [],
        shell=body.shell or "",
        env=body.env or {},
        cwd=body.cwd or "",
        user=body.user or "",
        stdin_b64=body.stdin_b64,
        timeout_ms=timeout_ms,
        max_output_bytes=MAX_OUTPUT_BYTES,
    )


def render_result(result: ExecResult, *, wants_base64: bool) -> rest.ExecAnswer:
    """Text always; base64 when asked for, or when the text would lose bytes."""
    stdout, stdout_b64 = _both(result.stdout_b64, wants_base64=wants_base64)
    stderr, stderr_b64 = _both(result.stderr_b64, wants_base64=wants_base64)
    return rest.ExecAnswer(
        exit_code=result.exit_code,
        stdout=stdout,
        stderr=stderr,
        stdout_b64=stdout_b64,
        stderr_b64=stderr_b64,
        signal=result.signal or msgspec.UNSET,
        timed_out=result.timed_out,
        duration_ms=result.duration_ms,
        truncated=result.truncated,
        total=result.total,
    )


def _both(encoded: str, *, wants_base64: bool) -> tuple[str, str | msgspec.UnsetType]:
    content = base64.b64decode(encoded)
    try:
        text, is_lossless = content.decode(), True
    except UnicodeDecodeError:
        text, is_lossless = content.decode("utf-8", "replace"), False
    return text, encoded if wants_base64 or not is_lossless else msgspec.UNSET
