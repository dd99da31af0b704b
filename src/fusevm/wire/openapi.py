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
    """The document as plain data. `failure` is the body of every answer that is no success."""
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
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "license": {"name": "MIT", "identifier": "MIT"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(same: list[Route], schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """One operation of the document; rows that differ in a selector become alternatives."""
    first = same[0]
    found: dict[str, Any] = {
        "operationId": first.name if len(same) == 1 else "_or_".join(route.name for route in same),
        "summary": first.summary,
        "parameters": _parameters(same),
        "responses": _responses(same, schema_of),
        "security": [] if first.scope is Scope.OPEN else [{"bearer": [first.scope.value]}],
    }
    if len(same) > 1:
        found["summary"] = f"By ?{first.selector}="
        found["description"] = "\n".join(f"- `{route.value}`: {_summary(route)}" for route in same)
    elif first.unimplemented:
        found["description"] = _summary(first)
    body = _request_body(same, schema_of)
    if body is not None:
        found["requestBody"] = body
    return found


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
    return {"required": any(route.request is not None for route in same), "content": content}


def _responses(same: list[Route], schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for route in same:
        if not route.unimplemented:
            for status in route.statuses:
                found.setdefault(str(status), _success(status, route, schema_of))
    by_status: dict[int, list[type[Error]]] = {}
    for cls in dict.fromkeys(cls for route in same for cls in errors_of(route)):
        by_status.setdefault(cls.status, []).append(cls)
    for status, classes in sorted(by_status.items()):
        reasons = ", ".join(f"`{cls.reason}`" for cls in classes)
        content = {Payload.JSON.value: {"schema": schema_of[Error]}}
        found.setdefault(str(status), {"description": f"details.reason: {reasons}", "content": content})
    return found


def _success(status: int, route: Route, schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    if status in (101, 204) or route.gives is Payload.NONE:
        return {"description": route.summary}
    schema = schema_of[route.answer] if route.answer is not None else {}
    return {"description": route.summary, "content": {route.gives.value: {"schema": schema}}}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if not schemas:
        return {}
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
