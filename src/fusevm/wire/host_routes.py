"""The one table of the host daemon's routes, and its OpenAPI document. The router and the documents' tests read it.

Errors are flat (`wire.errors.render_flat`). Orders carry the fence headers of `wire.host_api`. Everything but
`/health` needs the token on TCP; the Unix socket needs none, it is root's alone.
"""

from typing import Any

from fusevm.model import errors as e
from fusevm.model.network import Network
from fusevm.wire import host_api
from fusevm.wire.contract_routes import CONTRACT_ROUTES, CREATE_ROUTES
from fusevm.wire.errors import FlatError
from fusevm.wire.openapi import render_openapi
from fusevm.wire.routes import NO_LIMIT, Param, Payload, Route, Scope

_FENCE = (e.BadField, e.WrongCluster, e.StaleIncarnation, e.MachineExists)
_LATE = (e.StaleAction, e.OrderExpired)
_ORDER = (*_FENCE, *_LATE, e.MachineNotFound, e.NoSpace, e.ShuttingDown)
_BOOT = (
    e.HostFull,
    e.HostPortTaken,
    e.PublishedPortExists,
    e.PolicyNotEnforceable,
    e.BootFailed,
    e.VmmMissing,
    e.ImageCorrupt,
    e.GuestUnreachable,
    e.CommandFailed,
    e.Timeout,
)
_GUEST = (*_FENCE, *_LATE, e.MachineNotFound, e.WrongState, e.GuestUnreachable, e.AgentFailure, e.BadRequest)
_FILES = (
    e.FileNotFound,
    e.BadPath,
    e.BadRange,
    e.IsADirectory,
    e.NotADirectory,
    e.DirectoryNotEmpty,
    e.FileExists,
    e.PermissionDenied,
    e.NoSpaceInGuest,
    e.PayloadTooLarge,
    e.ProcessNotFound,
    e.StdinClosed,
    e.UnknownSignal,
    e.NotSupported,
    e.RouteNotFound,
)
_PULL = (
    e.ImageUnknown,
    e.ImageRefused,
    e.ImageTooLarge,
    e.DigestMismatch,
    e.FetchFailed,
    e.NoSpace,
    e.ToolMissing,
    e.CommandFailed,
    e.Timeout,
)
_COMMAND = (e.CommandNotFound, e.BadCwd, e.UnknownUser)
_MACHINE = "/machines/{id}"

HOST_ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/health",
        name="health",
        summary="The daemon serves",
        scope=Scope.OPEN,
        answer=host_api.Health,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        name="openapi",
        summary="This API as OpenAPI 3.1",
        scope=Scope.HOSTS,
    ),
    Route(
        method="GET",
        path="/info",
        name="info",
        summary="What this host is and can take; the heartbeat",
        scope=Scope.HOSTS,
        answer=host_api.HostFacts,
    ),
    Route(
        method="GET",
        path="/machines",
        name="list_machines",
        summary="All machines, oldest first, of all clusters",
        scope=Scope.HOSTS,
        answer=host_api.MachineList,
    ),
    Route(
        method="POST",
        path="/machines",
        name="create_machine",
        summary="Make a machine; answers when its agent is configured. Idempotent by (uid, incarnation)",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=host_api.CreateMachine,
        answer=host_api.MachineAnswer,
        statuses=(201,),
        limit=1 << 20,
        errors=(*_FENCE, *_LATE, e.NoSpace, e.ShuttingDown, e.ImageNotFound, *_BOOT),
    ),
    *CREATE_ROUTES,
    Route(
        method="GET",
        path=_MACHINE,
        name="get_machine",
        summary="One machine",
        scope=Scope.HOSTS,
        answer=host_api.MachineAnswer,
        errors=(e.BadField, e.MachineNotFound),
    ),
    Route(
        method="DELETE",
        path=_MACHINE,
        name="delete_machine",
        summary="Remove a machine, whatever it is doing, and remember that for a day. Idempotent",
        scope=Scope.HOSTS,
        gives=Payload.NONE,
        statuses=(204,),
        errors=(*_FENCE, e.OrderExpired, e.NoSpace, e.ShuttingDown, e.Timeout),
    ),
    Route(
        method="POST",
        path=_MACHINE + "/start",
        name="start_machine",
        summary="Boot a stopped machine with its disk; one that runs is returned",
        scope=Scope.HOSTS,
        answer=host_api.MachineAnswer,
        errors=(*_ORDER, e.WrongState, *_BOOT),
    ),
    Route(
        method="POST",
        path=_MACHINE + "/stop",
        name="stop_machine",
        summary="End a machine in order and keep its disk. Idempotent; a failed machine becomes a stopped one",
        scope=Scope.HOSTS,
        gives=Payload.NONE,
        statuses=(204,),
        errors=(*_ORDER, e.WrongState, e.Timeout),
    ),
    *CONTRACT_ROUTES,
    Route(
        method="POST",
        path=_MACHINE + "/exec",
        name="exec",
        summary="Run a command to its end (the contract's form). If the caller goes away, the command is killed",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=host_api.HostExec,
        answer=host_api.HostExecAnswer,
        limit=1 << 20,
        errors=(*_GUEST, *_COMMAND),
    ),
    Route(
        method="POST",
        path=_MACHINE + "/published-ports",
        name="publish_port",
        summary="Let a port of the host lead to one of a running machine. Idempotent by `published_port_id`",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=host_api.PublishPort,
        answer=host_api.PublishedPortAnswer,
        statuses=(201,),
        limit=1 << 16,
        errors=(
            *_ORDER,
            e.WrongState,
            e.HostFull,
            e.HostPortTaken,
            e.PublishedPortExists,
            e.PolicyNotEnforceable,
            e.CommandFailed,
            e.SlotFailed,
        ),
    ),
    Route(
        method="GET",
        path=_MACHINE + "/published-ports",
        name="list_published_ports",
        summary="Ports of the host that lead to a machine",
        scope=Scope.HOSTS,
        answer=host_api.PublishedPortList,
        errors=(e.BadField, e.MachineNotFound),
    ),
    Route(
        method="DELETE",
        path=_MACHINE + "/published-ports/{port_id}",
        name="unpublish_port",
        summary="Take a published port back and end its connections. Idempotent",
        scope=Scope.HOSTS,
        gives=Payload.NONE,
        statuses=(204,),
        errors=(*_ORDER, e.PolicyNotEnforceable, e.CommandFailed, e.SlotFailed),
    ),
    Route(
        method="GET",
        path=_MACHINE + "/network",
        name="get_network",
        summary="What a machine may reach, and what it has sent and received",
        scope=Scope.HOSTS,
        answer=host_api.NetworkAnswer,
        errors=(e.BadField, e.MachineNotFound, e.CommandFailed),
    ),
    Route(
        method="PUT",
        path=_MACHINE + "/network",
        name="set_network",
        summary="Hold a machine to another policy, its open connections included. Idempotent",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=Network,
        answer=host_api.NetworkAnswer,
        limit=1 << 18,
        errors=(*_ORDER, e.PolicyNotEnforceable, e.CommandFailed, e.SlotFailed),
    ),
    *(
        Route(
            method=method,
            path=_MACHINE + "/guest/{path:path}",
            name=f"relay_{method.lower()}",
            summary="Pass a request on to the guest agent (docs/guest-protocol.md), bodies streamed both ways",
            scope=Scope.HOSTS,
            takes=Payload.BYTES if method in ("POST", "PUT") else Payload.NONE,
            gives=Payload.BYTES,
            statuses=(200, 201, 202, 204, 206),
            limit=NO_LIMIT,
            errors=(*_GUEST, *_COMMAND, *_FILES),
        )
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE")
    ),
    Route(
        method="GET",
        path=_MACHINE + "/guest/exec",
        name="exec_frames",
        summary="Interactive command; one binary message is one exec frame",
        scope=Scope.HOSTS,
        gives=Payload.FRAMES,
        statuses=(101,),
        limit=NO_LIMIT,
        errors=_GUEST,
    ),
    Route(
        method="GET",
        path=_MACHINE + "/logs",
        name="logs",
        summary="The end of the machine's console, and with `follow` what comes next",
        scope=Scope.HOSTS,
        gives=Payload.TEXT,
        params=(
            Param(name="source", summary="`console`"),
            Param(name="follow", kind="boolean", summary="Go on until the machine ends"),
            Param(name="tail_bytes", kind="integer", summary="How much of what is there, default 65536"),
        ),
        errors=(*_FENCE, e.MachineNotFound),
    ),
    Route(
        method="GET",
        path="/events",
        name="events",
        summary="Changes of machines as they happen: first `hello`, now and then `keepalive`",
        scope=Scope.HOSTS,
        gives=Payload.LINES,
        answer=host_api.MachineEvent,
    ),
    Route(
        method="GET",
        path="/images",
        name="list_images",
        summary="Images on this host",
        scope=Scope.HOSTS,
        answer=host_api.ImageList,
    ),
    Route(
        method="POST",
        path="/images/pull",
        name="pull_image",
        summary="Fetch an image from a registry: steps as they happen, the last line has the image or the failure",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=host_api.PullImage,
        gives=Payload.LINES,
        answer=host_api.PullLine,
        limit=1 << 20,
        errors=(e.BadField, e.BadReference, *_PULL),
    ),
    Route(
        method="POST",
        path="/images/collect",
        name="collect_images",
        summary="Remove images that nothing uses and nobody names, with `all` also those that have a name",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=host_api.CollectImages,
        answer=host_api.CollectedImages,
    ),
    Route(
        method="DELETE",
        path="/images/{name:path}",
        name="remove_image",
        summary="Remove an image by digest, or a name of it, and with its last name the image",
        scope=Scope.HOSTS,
        params=(Param(name="force", kind="boolean", summary="All its names, and the image"),),
        answer=host_api.CollectedImage,
        errors=(e.BadField, e.ImageNotFound, e.ImageCorrupt, e.ImageInUse),
    ),
    Route(
        method="GET",
        path="/state",
        name="state",
        summary="The whole journal, and what is observed beside it",
        scope=Scope.HOSTS,
        answer=dict,
    ),
    Route(
        method="GET",
        path="/storage/report",
        name="storage_report",
        summary="What takes how much of the disk, in allocated blocks",
        scope=Scope.HOSTS,
        answer=host_api.StorageAnswer,
    ),
    Route(
        method="GET",
        path="/metrics",
        name="metrics",
        summary="Prometheus metrics",
        scope=Scope.HOSTS,
        gives=Payload.TEXT,
    ),
)


def render_host_openapi(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the host daemon as plain data."""
    document = render_openapi(version, HOST_ROUTES, title="Fuse host daemon", failure=FlatError)
    # The contract's word for `creating`, which its own machines are shown with.
    document["components"]["schemas"]["Phase"]["enum"].append("starting")
    return document
