"""What rows of the public table have in common: groups of errors, parameters, paths."""

from typing import Any

import msgspec

from fusevm.model import errors as e
from fusevm.wire.routes.table import Param, Payload, Route, Scope

ENVIRONMENT_ERRORS: tuple[type[e.Error], ...] = (e.EnvironmentNotFound, e.EnvironmentEnded)
HOST_ERRORS: tuple[type[e.Error], ...] = (
    e.HostUnreachable,
    e.HostRejected,
    e.HostUnproven,
    e.Timeout,
    e.WrongCluster,
    e.StaleIncarnation,
    e.StaleAction,
    e.MachineNotFound,
)
GUEST_ERRORS: tuple[type[e.Error], ...] = (
    *ENVIRONMENT_ERRORS,
    *HOST_ERRORS,
    e.WrongState,
    e.GuestUnreachable,
    e.AgentFailure,
    e.NotSupported,
    e.BadRequest,
)
COMMAND_ERRORS: tuple[type[e.Error], ...] = (
    *GUEST_ERRORS,
    e.CommandNotFound,
    e.BadCwd,
    e.UnknownUser,
    e.NoSpaceInGuest,
)
PROCESS_ERRORS: tuple[type[e.Error], ...] = (*GUEST_ERRORS, e.ProcessNotFound)
FILE_ERRORS: tuple[type[e.Error], ...] = (
    *GUEST_ERRORS,
    e.FileNotFound,
    e.BadPath,
    e.IsADirectory,
    e.NotADirectory,
    e.PermissionDenied,
    e.NoSpaceInGuest,
    e.UnknownUser,
    e.DirectoryNotEmpty,
    e.FileExists,
)
PREFER = Param(name="Prefer", place="header", summary="`respond-async`: answer 202 at once instead of waiting")
LIMIT = Param(name="limit", kind="integer", summary="Page size, default 50, at most 200")
CURSOR = Param(name="cursor", summary="`next_cursor` of the page before")
PATH = Param(name="path", is_required=True, summary="Absolute path in the machine")
RANGE = Param(name="Range", place="header", summary="One byte range")
UID = Param(name="uid", summary="Exact environment; the only way to ask for one that has ended")
LAST_ID = Param(name="last_event_id", summary="As the header `Last-Event-ID`: replay what came after that event")
RESUME = Param(name="Last-Event-ID", place="header", summary="Replay what came after that event")

ENVIRONMENTS, ENVIRONMENT = "/v1/environments", "/v1/environments/{id}"
NOT_YET = "it is not built yet"


_KEY = Param(
    name="Idempotency-Key",
    place="header",
    summary="Same key and request within 24 h: the stored answer, with `Idempotency-Replayed: true`. At most 255",
)
_IF_MATCH = Param(name="If-Match", place="header", summary="Only if the ETag is still this one; else 412")
_IF_NONE_MATCH = Param(name="If-None-Match", place="header", summary="304 if the ETag is still this one")
#: What a route that needs a right may answer besides.
GATE_ERRORS: tuple[type[e.Error], ...] = (e.ScopeMissing, e.RateLimited)


def completed(route: Route) -> Route:
    """A row with the headers and errors that follow from what it is."""
    params, errors = [*route.params], [*route.errors]
    if route.scope is not Scope.OPEN:
        errors += GATE_ERRORS
    if route.takes_key and not route.unimplemented:
        params.append(_KEY)
        errors += (e.IdempotencyKeyReused, e.IdempotencyInProgress)
    if route.is_versioned and route.method == "GET":
        params.append(_IF_NONE_MATCH)
    elif route.is_versioned and "{" in route.path:
        params.append(_IF_MATCH)
        errors.append(e.PreconditionFailed)
    if route.tells_secret:
        errors.append(e.NoEncryptionKey)
    return msgspec.structs.replace(route, params=tuple(params), errors=tuple(errors))


def later(method: str, path: str, name: str, summary: str, scope: Scope, why: str = NOT_YET, **more: Any) -> Route:
    """A row that is part of the contract and answers 501."""
    takes = Payload.JSON if method == "POST" else Payload.NONE
    return Route(
        method=method, path=path, name=name, summary=summary, scope=scope, takes=takes, unimplemented=why, **more
    )
