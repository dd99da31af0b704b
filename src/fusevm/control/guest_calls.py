"""Calls of our own to a guest agent, through its host: JSON in, a record out. What users send is relayed elsewhere."""

from typing import Any, TypeVar

import msgspec

from fusevm.control.host_api import GuestRequest, HostApi, Upstream
from fusevm.model.errors import Internal, NotSupported, RouteNotFound
from fusevm.model.machine import Fence
from fusevm.wire.decode import UNREADABLE

T = TypeVar("T")
#: Seconds until an answer, unless a call says otherwise.
CALL_TIMEOUT_S = 20.0
#: Longest answer that is read whole.
MAX_ANSWER = 4 << 20
_encode = msgspec.json.Encoder().encode


class GuestCalls:
    """The guest agent of one machine. Every call raises what the host or the agent answers."""

    def __init__(self, host: HostApi, fence: Fence, machine_id: str) -> None:
        self._host = host
        self._fence = fence
        self._machine_id = machine_id

    async def ask(
        self, method: str, target: str, answer: type[T], body: Any = None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> T:
        """Send a record (or nothing) and read one. Raises NotSupported for an agent that knows no such route."""
        upstream = await self.open(method, target, body, timeout_s=timeout_s)
        try:
            content = bytearray()
            async for chunk in upstream.chunks():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise Internal(problem=f"the guest agent's answer to {method} {target} is longer than agreed")
        finally:
            await upstream.close()
        try:
            return msgspec.json.decode(content or b"null", type=answer)
        except UNREADABLE as error:
            raise Internal(problem=f"the guest agent's answer to {method} {target} is unreadable: {error}") from error

    async def open(self, method: str, target: str, body: Any = None, *, timeout_s: float = CALL_TIMEOUT_S) -> Upstream:
        """Send a record and leave the answer's body to the caller, who closes it."""
        request = GuestRequest(
            fence=self._fence,
            machine_id=self._machine_id,
            method=method,
            target=f"guest/{target}",
            headers={"content-type": "application/json"} if body is not None else {},
            body=_encode(body) if body is not None else None,
            timeout_s=timeout_s,
        )
        try:
            return await self._host.relay(request)
        except RouteNotFound as error:
            raise NotSupported(
                feature=f"{method} /{target.partition('?')[0]} (the machine's agent is older)"
            ) from error
