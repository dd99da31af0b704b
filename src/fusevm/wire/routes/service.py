"""What monitors and people ask the server itself."""

from fusevm.wire import rest
from fusevm.wire.routes.parts import GATE_ERRORS
from fusevm.wire.routes.table import Payload, Route, Scope

SERVICE: tuple[Route, ...] = (
    Route(
        method="GET", path="/health", name="health", scope=Scope.OPEN, summary="The process lives", answer=rest.Health
    ),
    Route(
        method="GET",
        path="/ready",
        name="ready",
        scope=Scope.OPEN,
        summary="The store answers (200) or not (503)",
        answer=rest.Ready,
        statuses=(200, 503),
    ),
    Route(
        method="GET",
        path="/metrics",
        name="metrics",
        scope=Scope.OPEN,
        summary="Prometheus text. Asks for a token with the right `admin` where `FUSE_METRICS_AUTH` says so",
        errors=GATE_ERRORS,
        gives=Payload.TEXT,
    ),
    Route(
        method="GET",
        path="/v1/version",
        name="version",
        scope=Scope.OPEN,
        summary="Which server this is",
        answer=rest.Version,
    ),
    Route(
        method="GET",
        path="/v1/debug/invariants",
        name="check_invariants",
        scope=Scope.ADMIN,
        summary="Check everything in the store against the rules of the core, and tell every broken one in a sentence. "
        "Reads the whole store: for people, not for monitors",
        answer=rest.Invariants,
    ),
    Route(method="GET", path="/openapi.json", name="openapi", scope=Scope.OPEN, summary="This API as OpenAPI 3.1"),
)
