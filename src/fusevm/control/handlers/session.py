"""Login and logout of browsers. The cookie stands for the token; it is not the token."""

from starlette.responses import Response

from fusevm.control.call import Call, empty
from fusevm.control.config import has_secure_cookies
from fusevm.control.gate import Gate
from fusevm.control.keys import prefix_of
from fusevm.control.middleware import Handler
from fusevm.control.plane import Plane
from fusevm.control.session import render_cookie
from fusevm.model.errors import BadField
from fusevm.wire.rest_keys import Login


def handlers(gate: Gate) -> dict[str, Handler]:
    """The handlers of the routes that need the gate itself."""

    async def login(plane: Plane, call: Call) -> Response:
        gate.check_page(call.connection, may_be_no_page=True)
        body, _ = await call.json(Login)
        if not body.token:
            raise BadField(field="token", problem="give the master token or an API key")
        if not gate.asks_for_tokens:
            return empty()
        caller = await gate.by_token(call.connection, body.token)
        prefix = prefix_of(body.token) if caller.key_id else ""
        return _with_cookie(plane, gate.sessions.begin(caller.key_id, prefix))

    async def logout(plane: Plane, call: Call) -> Response:
        gate.check_page(call.connection, may_be_no_page=True)
        return _with_cookie(plane, "")

    return {"login": login, "logout": logout}


def _with_cookie(plane: Plane, value: str) -> Response:
    response = empty()
    response.headers["set-cookie"] = render_cookie(value, is_secure=has_secure_cookies(plane.config))
    return response
