"""Hosts."""

from fusevm.model import errors as e
from fusevm.wire import rest, rest_fleet
from fusevm.wire.routes.parts import CURSOR, LIMIT
from fusevm.wire.routes.table import Param, Payload, Route, Scope

_HOSTS, _HOST = "/v1/hosts", "/v1/hosts/{id}"
_ABSENT = (e.HostNotFound,)
_ACTIONS = {
    "cordon": "Place nothing new there. What runs there goes on",
    "uncordon": "Place there again; also ends a drain",
    "drain": "Cordon, and drain every environment there, also what comes up later; each ends by DELETE or when its "
    "linger time is over",
}

FLEET: tuple[Route, ...] = (
    Route(
        method="POST",
        path=_HOSTS,
        name="register_host",
        scope=Scope.ADMIN,
        summary="Register a host daemon, or update one: what is placed there and its cordon stay. It is asked for its "
        "capacity, which checks the token too; one that does not answer is accepted when its capacity is declared",
        takes=Payload.JSON,
        request=rest_fleet.RegisterHost,
        answer=rest.HostBody,
        is_versioned=True,
        makes=_HOST,
        statuses=(201,),
        errors=(
            e.HostUnreachable,
            e.HostRejected,
            e.HostUnproven,
            e.HostMismatch,
            e.WrongCluster,
            e.Timeout,
            e.RevisionConflict,
            e.Unimplemented,
            e.NoEncryptionKey,
        ),
    ),
    Route(
        method="GET",
        path=_HOSTS,
        name="list_hosts",
        scope=Scope.HOSTS,
        summary="List hosts by id",
        answer=rest.HostPage,
        params=(LIMIT, CURSOR),
    ),
    Route(
        method="GET",
        path=_HOST,
        name="get_host",
        is_versioned=True,
        scope=Scope.HOSTS,
        summary="One host",
        answer=rest.HostBody,
        errors=_ABSENT,
    ),
    *(
        Route(
            method="POST",
            path=_HOST,
            selector="action",
            value=action,
            name=f"{action}_host",
            is_versioned=True,
            scope=Scope.ADMIN,
            summary=summary,
            takes=Payload.NONE,
            gives=Payload.NONE,
            statuses=(204,),
            errors=_ABSENT,
        )
        for action, summary in _ACTIONS.items()
    ),
    Route(
        method="DELETE",
        path=_HOST,
        name="delete_host",
        is_versioned=True,
        scope=Scope.ADMIN,
        summary="Forget a host without environments. Its snapshots cannot be used any more (state error); they stay "
        "until they are deleted",
        gives=Payload.NONE,
        statuses=(204,),
        params=(
            Param(
                name="force",
                kind="boolean",
                summary="Also with environments, when it is lost or refuses us: they end as failed, reason host_lost",
            ),
        ),
        errors=(e.HostNotFound, e.HostInUse),
    ),
)
