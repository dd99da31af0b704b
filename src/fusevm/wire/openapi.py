"""The OpenAPI 3.1 document, made from the route table and the types it names. Pure; no route is described twice."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from fusevm.model.errors import Error
from fusevm.wire.errors import Envelope
from fusevm.wire.routes import ROUTES, Param, Payload, Route, Scope, errors_of

#: `{path:path}` takes the rest of a path (host daemon).
_SEGMENT = re.compile(r"{(\w+)(?::path)?}")
_REFERENCES = "#/components/schemas/{name}"


def render_openapi(
    version: str, routes: Iterable[Route] = ROUTES, *, title: str = "Fuse", failure: type[msgspec.Struct] = Envelope
) -> dict[str, Any]:
    """The document as plain data. `failure` is the body of every answer that is no success; with the public one come
    the public headers and the session cookie."""
    table = tuple(routes)
    types = [kind for route in table for kind in (route.request, route.answer) if kind is not None]
    unique = list(dict.fromkeys([*types, failure]))
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REFERENCES)
    schema_of = dict(zip(unique, schemas, strict=True))
    schema_of[Error] = schema_of[failure]
    paths: dict[str, dict[str, Any]] = {}
    for route in table:
        operations = paths.setdefault(_SEGMENT.sub(r"{\1}", route.path), {})
        method = route.method.lower()
        same = [other for other in table if (other.method, other.path) == (route.method, route.path)]
        if same[0] is route:
            operations[method] = _operation(same, schema_of)
            _link(operations[method], same, table)
            if failure is Envelope:
                _make_public(operations[method], same)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "license": {"name": "MIT", "identifier": "MIT"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": _BEARER | (_SESSION if failure is Envelope else {}),
            **({"headers": _HEADERS} if failure is Envelope else {}),
        },
    }


_BEARER = {"bearer": {"type": "http", "scheme": "bearer", "description": "The master token, or an API key"}}
_SESSION = {
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": "fuse_session",
        "description": "Made by POST /login. Looked at only when there is no Authorization header; all but reading "
        "must come from a page of the same origin, or of a listed one",
    }
}
_TEXT = {"type": "string"}
_HEADERS = {
    "X-Request-ID": {"description": "As sent, else a fresh one; in the log and in `cause` of events", "schema": _TEXT},
    "ETag": {"description": "The revision that the answer shows, for If-Match and If-None-Match", "schema": _TEXT},
    "Retry-After": {"description": "Seconds", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "Always `Bearer`", "schema": _TEXT},
    "Idempotency-Replayed": {"description": "`true`: the stored answer of an earlier request", "schema": _TEXT},
    "Warning": {"description": "Fields that nobody knows, and were ignored", "schema": _TEXT},
    "Set-Cookie": {"description": "The session, or its end", "schema": _TEXT},
}


def _make_public(operation: dict[str, Any], same: list[Route]) -> None:
    """Add what the edge of the public API does for every route."""
    if operation["security"]:
        operation["security"].append({"session": []})
    if same[0].is_versioned and same[0].method == "GET":
        operation["responses"]["304"] = {"description": "The ETag is still the one in If-None-Match"}
    for status, answer in operation["responses"].items():
        answer["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in _headers_of(status, same)}


def _headers_of(status: str, same: list[Route]) -> list[str]:
    is_success = status.startswith("2")
    given = {
        "X-Request-ID": True,
        "ETag": any(route.is_versioned for route in same) and (is_success or status == "304"),
        "Retry-After": status in ("429", "503"),
        "WWW-Authenticate": status == "401",
        "Idempotency-Replayed": is_success and any(route.takes_key for route in same),
        "Warning": is_success and any(route.takes is Payload.JSON for route in same),
        "Set-Cookie": is_success and same[0].name in ("login", "logout"),
    }
    return [name for name, is_given in given.items() if is_given]


def _operation(same: list[Route], schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """One operation of the document; rows that differ in a selector become alternatives."""
    first = same[0]
    found: dict[str, Any] = {
        "operationId": _operation_id(same),
        "summary": first.summary,
        "parameters": _parameters(same),
        "responses": _responses(same, schema_of),
        "security": [] if first.scope is Scope.OPEN else [{"bearer": [first.scope.value]}],
    }
    if len(same) > 1:
        # Rows without a selector are told apart by their bodies.
        found["summary"] = f"By ?{first.selector}=" if first.selector else "By the form of the body"
        found["description"] = "\n".join(f"- `{route.value or route.name}`: {_summary(route)}" for route in same)
    elif first.unimplemented:
        found["description"] = _summary(first)
    body = _request_body(same, schema_of)
    if body is not None:
        found["requestBody"] = body
    return found


def _operation_id(same: list[Route]) -> str:
    return "_or_".join(route.name for route in same)


def _link(operation: dict[str, Any], same: list[Route], table: tuple[Route, ...]) -> None:
    """Say what can be done with what the operation makes: every operation whose path names it and nothing else."""
    for route in same:
        for target in table if route.makes else ():
            names = _SEGMENT.findall(target.path)
            if not target.path.startswith(route.makes) or names != _SEGMENT.findall(route.makes):
                continue
            # The last id is the answer's; those before it are of what contains it, as the request named them.
            ids = {name: f"$request.path.{name}" for name in names[:-1]} | {names[-1]: f"$response.body#/{names[-1]}"}
            chosen = {target.selector: target.value} if target.selector else {}
            alike = [other for other in table if (other.method, other.path) == (target.method, target.path)]
            link = {"operationId": _operation_id(alike), "parameters": ids | chosen}
            for status in map(str, route.statuses):
                operation["responses"][status].setdefault("links", {})[target.name] = link


def _summary(route: Route) -> str:
    return route.summary + (f" (501: {route.unimplemented})" if route.unimplemented else "")


def _parameters(same: list[Route]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _SEGMENT.findall(same[0].path)
    ]
    if same[0].selector:
        values = [route.value for route in same]
        found.append(
            {"name": same[0].selector, "in": "query", "required": True, "schema": {"type": "string", "enum": values}}
        )
    params = {(param.place, param.name): param for route in same for param in route.params}
    return found + [_parameter(param) for param in params.values()]


def _parameter(param: Param) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": param.kind}
    if param.is_repeated:
        schema = {"type": "array", "items": schema}
    return {
        "name": param.name,
        "in": param.place,
        "required": param.is_required,
        "description": param.summary,
        "schema": schema,
    }


def _request_body(same: list[Route], schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any] | None:
    content: dict[str, Any] = {}
    for payload in dict.fromkeys(route.takes for route in same if route.takes is not Payload.NONE):
        kinds = [route.request for route in same if route.takes is payload and route.request is not None]
        content[payload.value] = {"schema": _any_of([schema_of[kind] for kind in dict.fromkeys(kinds)])}
    if not content:
        return None
    return {"required": any(_needs_a_body(route.request) for route in same), "content": content}


def _needs_a_body(kind: Any) -> bool:
    """Has it fields without a default? Else an absent body is as good as an empty object."""
    is_record = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    return any(field.required for field in msgspec.structs.fields(kind)) if is_record else kind is not None


def _responses(same: list[Route], schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    built = [route for route in same if not route.unimplemented]
    statuses = dict.fromkeys(status for route in built for status in route.statuses)
    found = {
        str(status): _success(status, [route for route in built if status in route.statuses], schema_of)
        for status in statuses
    }
    by_status: dict[int, list[type[Error]]] = {}
    for cls in dict.fromkeys(cls for route in same for cls in errors_of(route)):
        by_status.setdefault(cls.status, []).append(cls)
    for status, classes in sorted(by_status.items()):
        reasons = ", ".join(f"`{cls.reason}`" for cls in classes)
        content = {Payload.JSON.value: {"schema": schema_of[Error]}}
        found.setdefault(str(status), {"description": f"details.reason: {reasons}", "content": content})
    return found


def _success(status: int, same: list[Route], schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """A status with which several rows may answer, each with its own body."""
    found: dict[str, Any] = {"description": "; or: ".join(route.summary for route in same)}
    content: dict[str, list[dict[str, Any]]] = {}
    for route in same:
        if status in (101, 204) or route.gives is Payload.NONE:
            continue
        schema = schema_of[route.answer] if route.answer is not None else {}
        schemas = content.setdefault(route.gives.value, [])
        schema = _message(schema) if route.gives is Payload.EVENTS else schema
        schemas += [] if schema in schemas else [schema]
    if content:
        found["content"] = {payload: {"schema": _any_of(schemas)} for payload, schemas in content.items()}
    return found


def _message(schema: dict[str, Any]) -> dict[str, Any]:
    """One message of an event stream."""
    data = {"type": "string", "contentMediaType": Payload.JSON.value, "contentSchema": schema}
    return {"type": "object", "required": ["data"], "properties": {"id": _TEXT, "data": data}}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if not schemas:
        return {}
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
