"""What an agent that is an ordinary process cannot do: hold its machine's disk still.

Requests to hold it and to let it go are answered here, on their way to the agent; everything else passes. That it is
held is a file, which outlives the daemon as a guest's freeze does, and says until when: the limit that was asked for.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from fusevm.host.channel import AgentStream

#: The beginnings of what is answered here.
_HOLD, _LET_GO = b"POST /quiesce ", b"POST /thaw "


class HeldDisk:
    """Whether one machine's disk is held."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def is_held(self) -> bool:
        """True until it is let go, or the limit is over."""
        try:
            return time.monotonic() < float(self._path.read_text())
        except FileNotFoundError:
            return False

    def hold(self, body: bytes) -> dict[str, object]:
        """Hold it, as the body of `/quiesce` asks; the answer's body."""
        self._path.write_text(str(time.monotonic() + json.loads(body)["limit_ms"] / 1000))
        return {"took_ms": 0}

    def let_go(self) -> dict[str, object]:
        """Let it go; the body of the answer to `/thaw`."""
        was_frozen = self.is_held
        self._path.unlink(missing_ok=True)
        return {"was_frozen": was_frozen}


class HoldingStream:
    """A stream to the agent (`AgentStream`), or to what is there in its place. The first request decides."""

    def __init__(self, stream: AgentStream, disk: HeldDisk) -> None:
        self._stream = stream
        self._disk = disk
        self._is_decided = False
        #: What is left of the answer in the agent's place; None: it is the agent's to answer.
        self._said: bytes | None = None

    @property
    def is_usable(self) -> bool:
        """False once either side has closed it."""
        return self._said is None and self._stream.is_usable

    async def read(self, limit: int) -> bytes:
        """Of the answer."""
        if self._said is None:
            return await self._stream.read(limit)
        data, self._said = self._said[:limit], self._said[limit:]
        return data

    async def write(self, data: bytes) -> None:
        """The first is a request with its whole head, and a short body with it (`wire.http1`)."""
        if not self._is_decided:
            self._is_decided = True
            self._said = self._answer(data)
        if self._said is None:
            await self._stream.write(data)

    async def close_write(self) -> None:
        """Nothing more is sent."""
        if self._said is None:
            await self._stream.close_write()

    async def close(self) -> None:
        """Drop it."""
        await self._stream.close()

    def _answer(self, data: bytes) -> bytes | None:
        head, _, body = data.partition(b"\r\n\r\n")
        kind = next((kind for kind in (_HOLD, _LET_GO) if head.startswith(kind)), None)
        if kind is None:
            return None
        answer = json.dumps(self._disk.hold(body) if kind is _HOLD else self._disk.let_go()).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer
