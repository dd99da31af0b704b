"""API keys, and sessions of browsers."""

from fusevm.model import errors as e
from fusevm.wire import rest_keys as rest
from fusevm.wire.routes.table import KIB, Payload, Route, Scope

KEYS: tuple[Route, ...] = (
    Route(
        method="POST",
        path="/v1/api-keys",
        name="create_api_key",
        scope=Scope.ADMIN,
        summary="Create a key. The answer is the only one that ever shows it",
        takes=Payload.JSON,
        request=rest.CreateKey,
        answer=rest.NewKey,
        statuses=(201,),
        makes="/v1/api-keys/{id}",
        tells_secret=True,
    ),
    Route(
        method="GET",
        path="/v1/api-keys",
        name="list_api_keys",
        scope=Scope.ADMIN,
        summary="All keys, newest first, expired and revoked ones included",
        answer=rest.KeyList,
    ),
    Route(
        method="DELETE",
        path="/v1/api-keys/{id}",
        name="revoke_api_key",
        scope=Scope.ADMIN,
        summary="Revoke a key, on every replica from the next request on.",
        gives=Payload.NONE,
        statuses=(204,),
        errors=(e.KeyNotFound,),
    ),
    Route(
        method="POST",
        path="/login",
        name="login",
        scope=Scope.OPEN,
        summary="Begin a session: the cookie `fuse_session` stands for the token for 7 days, or until that is revoked",
        takes=Payload.JSON,
        request=rest.Login,
        gives=Payload.NONE,
        statuses=(204,),
        limit=4 * KIB,
        errors=(e.RateLimited, e.NoEncryptionKey),
    ),
    Route(
        method="POST",
        path="/logout",
        name="logout",
        scope=Scope.OPEN,
        summary="Delete the session cookie",
        gives=Payload.NONE,
        statuses=(204,),
    ),
)
