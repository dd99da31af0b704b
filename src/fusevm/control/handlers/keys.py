"""API keys: made, listed, revoked."""

import re
import secrets

from starlette.responses import Response

from fusevm.control.call import Call, empty, reply
from fusevm.control.keys import digest_of, make_text
from fusevm.control.plane import Plane
from fusevm.control.render import render_time
from fusevm.model.api_key import ApiKey
from fusevm.model.errors import BadField, KeyNotFound
from fusevm.wire import rest_keys as rest
from fusevm.wire.routes import Scope

MAX_LABEL = 200
#: A year times ten: keeps every time far inside of 64 bits.
MAX_LIFE_S = 10 * 365 * 86_400
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: Rights of a key that asks for none in particular, as keys of the contract have them; and those that no tenant gets,
#: since they reach beyond its own environments.
_USUAL = (Scope.READ, Scope.WRITE, Scope.EXEC, Scope.SNAPSHOTS)
_BEYOND = (Scope.HOSTS, Scope.ADMIN)
_KNOWN = tuple(scope for scope in Scope if scope is not Scope.OPEN)


async def create_api_key(plane: Plane, call: Call) -> Response:
    body, _ = await call.json(rest.CreateKey)
    prefix, text = make_text()
    now_ms = plane.clock.now_ms()
    key = ApiKey(
        id=f"ak_{secrets.token_hex(8)}",
        prefix=prefix,
        digest=digest_of(text),
        label=_label(body.label),
        tenant=_tenant(body.tenant),
        scopes=_scopes(body),
        created_at_ms=now_ms,
        expires_at_ms=now_ms + body.expires_in_seconds * 1000 if _life(body.expires_in_seconds) else None,
    )
    await plane.store.add_key(key)
    shown = render_key(key)
    return reply(rest.NewKey(**{name: getattr(shown, name) for name in shown.__struct_fields__}, key=text), 201)


async def list_api_keys(plane: Plane, _call: Call) -> Response:
    return reply(rest.KeyList(api_keys=[render_key(key) for key in await plane.store.keys()]))


async def revoke_api_key(plane: Plane, call: Call) -> Response:
    if not await plane.store.revoke_key(call.params["id"], plane.clock.now_ms()):
        raise KeyNotFound(id=call.params["id"])
    return empty()


def render_key(key: ApiKey) -> rest.KeyBody:
    """A key without its text, which nobody knows any more."""
    return rest.KeyBody(
        id=key.id,
        label=key.label,
        tenant=key.tenant,
        scopes=list(key.scopes),
        created_at=render_time(key.created_at_ms),
        expires_at=render_time(key.expires_at_ms),
        last_used_at=render_time(key.last_used_at_ms),
        revoked_at=render_time(key.revoked_at_ms),
    )


def _label(label: str) -> str:
    if len(label) > MAX_LABEL or not label.isprintable():
        raise BadField(field="label", problem=f"use at most {MAX_LABEL} printable characters")
    return label


def _tenant(tenant: str) -> str:
    if tenant and not _TENANT.fullmatch(tenant):
        problem = "use 1 to 63 letters, digits, '.', '_' and '-', starting with a letter or digit"
        raise BadField(field="tenant", problem=problem)
    return tenant


def _life(seconds: int) -> int:
    if not 0 <= seconds <= MAX_LIFE_S:
        raise BadField(field="expires_in_seconds", problem=f"{seconds} is not within 0 (without end) to {MAX_LIFE_S}")
    return seconds


def _scopes(body: rest.CreateKey) -> tuple[str, ...]:
    for scope in body.scopes:
        if scope not in _KNOWN:
            raise BadField(field="scopes", problem=f"{scope[:40]!r} is none of {', '.join(_KNOWN)}")
        if body.tenant and scope in _BEYOND:
            problem = f"{scope!r} reaches beyond a tenant; leave it out, or make a key without tenant"
            raise BadField(field="scopes", problem=problem)
    usual = _USUAL if body.tenant else (*_USUAL, Scope.HOSTS)
    return tuple(dict.fromkeys(body.scopes)) or tuple(scope.value for scope in usual)
