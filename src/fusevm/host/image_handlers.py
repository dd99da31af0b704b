"""The image routes: decoding, one call, encoding."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fusevm.host.bodies import decode_noting, read_body, render_json
from fusevm.host.daemon import Daemon
from fusevm.host.images.reference import parse_reference
from fusevm.model.errors import BadField
from fusevm.wire.host_api import CollectImages, PullImage
from fusevm.wire.routes import Payload, Route

Handler: TypeAlias = Callable[[Daemon, Request, Route], Awaitable[Response]]


async def _list_images(daemon: Daemon, _request: Request, _route: Route) -> Response:
    return render_json(await daemon.images.list_images())


async def _pull_image(daemon: Daemon, request: Request, route: Route) -> Response:
    order = decode_noting(request, await read_body(request, route), PullImage)
    parse_reference(order.reference)
    lines = (msgspec.json.encode(line) + b"\n" async for line in daemon.images.pull_lines(order))
    return StreamingResponse(lines, media_type=Payload.LINES.value)


async def _collect_images(daemon: Daemon, request: Request, route: Route) -> Response:
    order = decode_noting(request, await read_body(request, route), CollectImages)
    return render_json(await daemon.images.collect(order))


async def _remove_image(daemon: Daemon, request: Request, _route: Route) -> Response:
    force = request.query_params.get("force", "false")
    if force not in ("true", "false"):
        raise BadField(field="force", problem="must be true or false")
    return render_json(await daemon.images.remove(request.path_params["name"], is_forced=force == "true"))


IMAGE_HANDLERS: dict[str, Handler] = {
    "list_images": _list_images,
    "pull_image": _pull_image,
    "collect_images": _collect_images,
    "remove_image": _remove_image,
}
