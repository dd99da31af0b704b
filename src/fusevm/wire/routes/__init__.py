"""The one table of public routes. The server's router, the OpenAPI document, the SDK's and the docs' tests read it.

A row is one operation. Operations that share method and path differ in the value of a selector (`?action=` or `?op=`).
A row with `unimplemented` is part of the contract and answers 501 with that sentence. Handlers are found by `name`.
"""

from fusevm.wire.routes.fleet import FLEET
from fusevm.wire.routes.inside import INSIDE, LOG_SOURCES
from fusevm.wire.routes.keys import KEYS
from fusevm.wire.routes.life import LIFE
from fusevm.wire.routes.parts import GATE_ERRORS, completed
from fusevm.wire.routes.service import SERVICE
from fusevm.wire.routes.snapshots import SNAPSHOTS
from fusevm.wire.routes.table import (
    BODY_ERRORS,
    COMMON_ERRORS,
    JSON_LIMIT,
    KIB,
    MIB,
    NO_LIMIT,
    Param,
    Payload,
    Route,
    Scope,
    errors_of,
)

ROUTES: tuple[Route, ...] = tuple(completed(route) for route in (*LIFE, *INSIDE, *SNAPSHOTS, *FLEET, *KEYS, *SERVICE))

__all__ = [
    "BODY_ERRORS",
    "COMMON_ERRORS",
    "GATE_ERRORS",
    "JSON_LIMIT",
    "KIB",
    "LOG_SOURCES",
    "MIB",
    "NO_LIMIT",
    "ROUTES",
    "Param",
    "Payload",
    "Route",
    "Scope",
    "errors_of",
]
