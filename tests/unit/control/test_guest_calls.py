"""Answers of guest agents, in which everything is as the guest wants it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from fusevm.control.guest_calls import GuestCalls
from fusevm.control.host_api import GuestRequest
from fusevm.model.errors import Internal
from fusevm.model.machine import Fence
from fusevm.wire.guest import Exit


class Said:
    """An answer."""

    status = 200
    headers: dict[str, str] = {}

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.is_closed = False

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._content

    async def close(self) -> None:
        self.is_closed = True


class Host:
    """Passes a guest's answer on."""

    def __init__(self, said: Said) -> None:
        self._said = said

    async def relay(self, _request: GuestRequest) -> Said:
        return self._said


@pytest.mark.parametrize("content", [b"[", b"7", b'{"signal":"\xff"}'], ids=["no JSON", "another kind", "no UTF-8"])
async def test_an_answer_that_cannot_be_read_is_an_error_that_says_so(content: bytes):
    said = Said(content)
    host: Any = Host(said)
    calls = GuestCalls(host, Fence(cluster="c", uid="u", incarnation=1, action_seq=1), "m-1")
    with pytest.raises(Internal, match="unreadable"):
        await calls.ask("GET", "status", Exit)
    assert said.is_closed
