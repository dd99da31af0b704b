"""The contract's routes: decoding, one call, encoding. Paths and bodies: `wire.contract_routes`, `wire.contract`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fusevm.host.admission import Size
from fusevm.host.bodies import decode_noting, read_body, render_json
from fusevm.host.contract.agent_files import AgentFiles
from fusevm.host.contract.create import plan_create
from fusevm.host.contract.operations import Reading, perform
from fusevm.host.contract.relays import exec_relay, first_relays, is_published
from fusevm.host.contract.render import render_body
from fusevm.host.daemon import Daemon
from fusevm.host.quarantine import Quarantine
from fusevm.host.relay import run_for_client
from fusevm.model.errors import BootFailed, MachineExists, Unimplemented
from fusevm.model.ids import parse_machine_id
from fusevm.model.machine import Fence, Machine
from fusevm.wire.contract import (
    USER,
    CreateContractMachine,
    FilesAnswer,
    FilesOperation,
    MountList,
    ResizeMachine,
)
from fusevm.wire.contract_routes import NO_MOUNTS
from fusevm.wire.host_api import parse_fence
from fusevm.wire.routes import Payload, Route

Handler: TypeAlias = Callable[[Daemon, Request, Route], Awaitable[Response]]


async def create_by_contract(daemon: Daemon, body: CreateContractMachine, fence: Fence | None) -> Machine:
    """Make a machine. One whose guest did not get ready is returned as well: failed, with the reason."""
    # Before anything is fetched; the journal has the last word.
    if parse_machine_id(body.machine_id) in daemon.machines.ids():
        raise MachineExists(id=body.machine_id)
    create, contract = await plan_create(
        body,
        fence,
        importer=daemon.artifacts,
        login_ca=daemon.config.login_ca,
        relays=first_relays(daemon.isolation),
        entropy=daemon.entropy,
    )
    try:
        return await daemon.machines.create(create, None, contract)
    except BootFailed:
        return daemon.machines.record(body.machine_id)


def default_user(machine: Machine) -> str:
    """Who a command runs as when nobody is named: the contract's user; in other machines the image's."""
    return USER if machine.contract is not None else ""


def render_one(
    machine: Machine,
    status: int = 200,
    *,
    quarantine: Quarantine | None = None,
    ports_used_s_ago: int | None = None,
) -> Response:
    """The answer about one machine."""
    return render_json({"machine": render_body(machine, quarantine, ports_used_s_ago)}, status)


async def _resize(daemon: Daemon, request: Request, route: Route) -> Response:
    body = decode_noting(request, await read_body(request, route), ResizeMachine)
    size = Size(memory_mib=max(0, body.memory_mib), disk_bytes=max(0, body.storage_bytes))
    return render_one(await daemon.machines.resize(_machine_id(request), parse_fence(request.headers), size))


async def _files(daemon: Daemon, request: Request, route: Route) -> Response:
    """One operation. A content that is read is passed on as it comes, and the disk stays open for as long."""
    asked = decode_noting(request, await read_body(request, route), FilesOperation)
    machine_id = _machine_id(request)
    async with AsyncExitStack() as stack:
        work = _operate(daemon, machine_id, parse_fence(request.headers), asked, stack)
        answer = await run_for_client(request.receive, machine_id, work)
        match answer:
            case None:
                return Response(status_code=499)  # nobody reads it
            case Reading():
                return StreamingResponse(_read(answer, stack.pop_all()), media_type=Payload.JSON.value)
            case _:
                return render_json(answer)


async def _operate(
    daemon: Daemon, machine_id: str, fence: Fence | None, asked: FilesOperation, stack: AsyncExitStack
) -> FilesAnswer | Reading:
    agent = await stack.enter_async_context(daemon.machines.files(machine_id, fence))
    answer = await perform(AgentFiles(agent), asked)
    if isinstance(answer, Reading):
        stack.push_async_callback(answer.reader.close)
    return answer


async def _read(reading: Reading, stack: AsyncExitStack) -> AsyncIterator[bytes]:
    async with stack:
        async for chunk in reading.chunks():
            yield chunk


async def _exec_relay(daemon: Daemon, request: Request, _route: Route) -> Response:
    machine_id, fence = _machine_id(request), parse_fence(request.headers)
    machine = daemon.machines.owned(machine_id, fence)
    draft = exec_relay(machine)
    if not is_published(machine, draft):
        await daemon.machines.publish(machine_id, fence, draft)
    return render_one(daemon.machines.record(machine_id))


async def _mounts(daemon: Daemon, request: Request, _route: Route) -> Response:
    daemon.machines.owned(_machine_id(request), parse_fence(request.headers))
    return render_json(MountList())


async def _no_mounts(daemon: Daemon, request: Request, _route: Route) -> Response:
    daemon.machines.owned(_machine_id(request), parse_fence(request.headers))
    raise Unimplemented(feature="mounts", why=NO_MOUNTS)


def _machine_id(request: Request) -> str:
    return str(request.path_params["id"])


CONTRACT_HANDLERS: dict[str, Handler] = {
    "resize_machine": _resize,
    "files_ops": _files,
    "exec_relay": _exec_relay,
    "list_mounts": _mounts,
    "create_mount": _no_mounts,
    "delete_mount": _no_mounts,
}
