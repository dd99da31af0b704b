"""The guest multiplexer as the host sees it: many streams over one byte channel. No I/O.

`Decoder` cuts bytes into frames and finds its way back after noise; `Session` is one epoch of the host's side: it takes
bytes from the guest, hands out bytes for the guest, and holds the state of every stream. Specification and golden file:
docs/guest-protocol.md section 1.

| offset | size | field (big-endian) |
|---|---|---|
| 0 | 2 | magic `FU` |
| 2 | 1 | version, 1 |
| 3 | 1 | type |
| 4 | 4 | stream id; 0 with HELLO only |
| 8 | 4 | payload length, at most 32768 |
| 12 | 4 | CRC-32 over bytes 0..11 and the payload |
| 16 | n | payload |
"""

import struct
from collections import deque
from enum import IntEnum
from typing import Final, NamedTuple
from zlib import crc32

HEADER_SIZE: Final = 16
MAX_PAYLOAD: Final = 32768
EPOCH_SIZE: Final = 16
INITIAL_CREDIT: Final = 262144
MAX_STREAMS: Final = 1024
#: Zero bytes before a HELLO: they complete whatever frame the guest was reading.
PREAMBLE_SIZE: Final = HEADER_SIZE + MAX_PAYLOAD

_MAGIC: Final = b"FU\x01"
_HEAD = struct.Struct(">3sBII")
_U32 = struct.Struct(">I")
_HELLO_SIZE: Final = HEADER_SIZE + EPOCH_SIZE
#: Credit is returned after a quarter of the window: a bulk sender then never runs dry.
_RETURN_AFTER: Final = INITIAL_CREDIT // 4
#: Smaller payloads are kept together: a window full of tiny objects would take many times its size.
_SMALL: Final = 4096
#: More credit than this is a broken peer.
_MAX_CREDIT: Final = 1 << 30
_MAX_ID: Final = 0xFFFFFFFF


class FrameType(IntEnum):
    """What a frame says."""

    HELLO = 0
    OPEN = 1
    DATA = 2
    WINDOW = 3
    CLOSE = 4
    RESET = 5


_HELLO_START: Final = _HEAD.pack(_MAGIC, FrameType.HELLO, 0, EPOCH_SIZE)
#: Smallest and largest payload of each type, by number.
_LENGTHS: Final = ((EPOCH_SIZE, EPOCH_SIZE), (0, 0), (1, MAX_PAYLOAD), (4, 4), (0, 0), (0, 0))


class Frame(NamedTuple):
    """One unit on the channel. `type` is a FrameType; a plain number, because a bulk transfer has many."""

    type: int
    stream: int
    payload: bytes = b""


class MuxViolation(Exception):
    """The guest broke the protocol; the connection cannot go on."""


class StreamsExhausted(Exception):
    """The epoch has no stream left: too many at once, or every id used."""


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame."""
    head = _HEAD.pack(_MAGIC, frame.type, frame.stream, len(frame.payload))
    return b"".join((head, _U32.pack(crc32(frame.payload, crc32(head))), frame.payload))


class Decoder:
    """Finds frames in bytes that arrive in any pieces.

    It starts out of sync, and a bad header or checksum puts it out of sync again: then bytes are dropped one at a time,
    those of the rejected frame included, until a valid HELLO starts.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.is_synced = False
        #: How often a bad header or checksum was met while in sync.
        self.losses = 0

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Add bytes; return the frames that are complete now. What is kept is less than one frame."""
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        at, size = 0, len(buffer)
        with memoryview(buffer) as view:
            while True:
                if not self.is_synced:
                    at = self._search(view, at)
                    if not self.is_synced:
                        break
                if size - at < HEADER_SIZE:
                    break
                magic, kind, stream, length = _HEAD.unpack_from(view, at)
                body = at + HEADER_SIZE
                if magic == _MAGIC and _is_header(kind, stream, length):
                    end = body + length
                    if end > size:
                        break
                    if crc32(view[body:end], crc32(view[at : at + 12])) == _U32.unpack_from(view, at + 12)[0]:
                        frames.append(Frame(kind, stream, bytes(view[body:end])))
                        at = end
                        continue
                self.is_synced = False
                self.losses += 1
        del buffer[:at]
        return frames

    def _search(self, view: memoryview, at: int) -> int:
        """Drop bytes until a valid HELLO starts; return where it, or what may become one, starts."""
        while True:
            found = self._buffer.find(_HELLO_START, at)
            if found < 0:
                return max(at, len(view) - len(_HELLO_START) + 1)
            if len(view) - found < _HELLO_SIZE:
                return found
            checksum = crc32(view[found + HEADER_SIZE : found + _HELLO_SIZE], crc32(_HELLO_START))
            if checksum == _U32.unpack_from(view, found + 12)[0]:
                self.is_synced = True
                return found
            at = found + 1


def _is_header(kind: int, stream: int, length: int) -> bool:
    # A length that the type does not allow is as bad as a wrong magic: both mean that the reader is lost.
    if kind >= len(_LENGTHS):
        return False
    least, most = _LENGTHS[kind]
    return least <= length <= most and (kind == FrameType.HELLO) == (stream == 0)


class MuxStream:
    """State of one stream. Made by `Session.open`; its methods change state and queue frames, never wait."""

    def __init__(self, session: "Session", stream_id: int) -> None:
        self.id = stream_id
        self._session = session
        self._inbox: deque[bytes | bytearray] = deque()
        self._head = 0  # bytes of the first chunk that were read
        self._window = INITIAL_CREDIT  # what the guest may still send
        self._owed = 0  # read, not yet returned to the guest
        self._credit = INITIAL_CREDIT  # what we may still send
        self._outbox = memoryview(b"")
        self._opening = True
        self._close_wanted = False
        self._close_sent = False
        self._reset_wanted = False
        #: The guest has sent all it will.
        self.is_ended = False
        #: Reset by either side, or the epoch is over.
        self.is_gone = False
        self._queued = False

    @property
    def has_data(self) -> bool:
        """True when `read` returns bytes."""
        return bool(self._inbox)

    @property
    def is_sending(self) -> bool:
        """True while bytes of the last `write` wait for credit or their turn."""
        return len(self._outbox) > 0

    @property
    def can_send(self) -> bool:
        """True until `close_write`, or the end of the stream."""
        return not (self.is_gone or self._close_wanted)

    def read(self, limit: int) -> bytes:
        """Take up to `limit` received bytes, b"" when there are none, and give credit back to the guest."""
        inbox = self._inbox
        parts: list[bytes | bytearray | memoryview] = []
        left = limit
        while inbox and left > 0:
            size = min(len(inbox[0]) - self._head, left)
            whole = size == len(inbox[0])
            parts.append(inbox[0] if whole else memoryview(inbox[0])[self._head : self._head + size])
            self._head += size
            left -= size
            if self._head == len(inbox[0]):
                inbox.popleft()
                self._head = 0
        self._owed += limit - left
        self._queue()
        return b"".join(parts)

    def write(self, data: bytes) -> None:
        """Queue bytes; only while `can_send` and not `is_sending`. They are taken as credit and turns allow."""
        self._outbox = memoryview(data)
        self._queue()

    def close_write(self) -> None:
        """Half-close after what is queued. Idempotent."""
        self._close_wanted = True
        self._queue()

    def reset(self) -> None:
        """Drop the stream both ways. Idempotent; nothing is sent for one that is over anyway."""
        self._inbox.clear()
        if not (self.is_gone or (self.is_ended and self._close_sent)):
            self._abort()

    def _abort(self) -> None:
        self._reset_wanted = True
        self._fail()
        self._queue()

    def _fail(self) -> None:
        self.is_gone = True
        self._outbox = memoryview(b"")

    def _receive(self, payload: bytes) -> None:
        # Beyond its credit, or after its CLOSE: this stream is beyond repair, the others are not.
        if len(payload) > self._window or self.is_ended:
            self._abort()
            return
        self._window -= len(payload)
        tail = self._inbox[-1] if self._inbox else b""
        if isinstance(tail, bytearray) and len(tail) + len(payload) <= MAX_PAYLOAD:
            tail += payload
        else:
            self._inbox.append(payload if len(payload) >= _SMALL else bytearray(payload))

    def _grant(self, payload: bytes) -> None:
        self._credit += _U32.unpack(payload)[0]
        if self._credit > _MAX_CREDIT:
            self._abort()
        self._queue()

    def _has_work(self) -> bool:
        return (
            self._reset_wanted
            or self._opening
            or (self._owed >= _RETURN_AFTER and not self.is_ended)
            or (len(self._outbox) > 0 and self._credit > 0)
            or (self._close_wanted and not self._close_sent and not self._outbox)
        )

    def _queue(self) -> None:
        if not self._queued and (not self.is_gone or self._reset_wanted) and self._has_work():
            self._queued = True
            self._session.queue(self)

    def _take(self, batch: bytearray) -> bool:
        """Append one turn: what is due, and at most one DATA frame. Return whether the last `write` is done with it."""
        self._queued = False
        if self._opening:
            self._opening = False
            batch += encode_frame(Frame(FrameType.OPEN, self.id))
        if self._reset_wanted:
            self._reset_wanted = False
            batch += encode_frame(Frame(FrameType.RESET, self.id))
            self._session.forget(self)
            return False
        if self._owed >= _RETURN_AFTER and not self.is_ended:
            batch += encode_frame(Frame(FrameType.WINDOW, self.id, _U32.pack(self._owed)))
            self._window += self._owed
            self._owed = 0
        is_done = self._take_data(batch)
        if self._close_wanted and not self._close_sent and not self._outbox:
            self._close_sent = True
            batch += encode_frame(Frame(FrameType.CLOSE, self.id))
            self._session.forget_if_over(self)
        self._queue()
        return is_done

    def _take_data(self, batch: bytearray) -> bool:
        size = min(len(self._outbox), self._credit, MAX_PAYLOAD)
        if size == 0:
            return False
        payload = self._outbox[:size]
        head = _HEAD.pack(_MAGIC, FrameType.DATA, self.id, size)
        batch += head
        batch += _U32.pack(crc32(payload, crc32(head)))
        batch += payload
        self._credit -= size
        self._outbox = self._outbox[size:]
        return not self._outbox

    @property
    def is_over(self) -> bool:
        """True when both sides have closed in order."""
        return self.is_ended and self._close_sent


class Session:
    """The host's side of one epoch. Starts by sending `greeting`; is of no use after a MuxViolation or `fail`."""

    def __init__(self, epoch: bytes) -> None:
        if len(epoch) != EPOCH_SIZE:
            raise ValueError(f"an epoch has {EPOCH_SIZE} bytes")
        self._epoch = epoch
        self._decoder = Decoder()
        self._streams: dict[int, MuxStream] = {}
        self._next_id = 1
        self._turns: deque[MuxStream] = deque()
        self._refusals: deque[int] = deque()
        #: The guest has echoed our epoch.
        self.is_synced = False

    @property
    def greeting(self) -> bytes:
        """What has to be sent first: enough zeros to end any half frame, and HELLO."""
        return bytes(PREAMBLE_SIZE) + encode_frame(Frame(FrameType.HELLO, 0, self._epoch))

    @property
    def stream_count(self) -> int:
        """Streams that are not gone."""
        return len(self._streams)

    def open(self) -> MuxStream:
        """Open a stream. Raises StreamsExhausted."""
        if len(self._streams) >= MAX_STREAMS or self._next_id > _MAX_ID:
            raise StreamsExhausted
        stream = MuxStream(self, self._next_id)
        self._next_id += 1
        self._streams[stream.id] = stream
        stream._queue()
        return stream

    def receive(self, data: bytes | bytearray | memoryview) -> list[MuxStream]:
        """Take bytes from the guest; return the streams whose state has changed. Raises MuxViolation."""
        changed: dict[int, MuxStream] = {}
        losses = self._decoder.losses
        for frame in self._decoder.feed(data):
            if self.is_synced:
                stream = self._handle(frame)
                if stream is not None:
                    changed[stream.id] = stream
            elif frame.type == FrameType.HELLO and frame.payload == self._epoch:
                self.is_synced = True
                losses = self._decoder.losses
        if self.is_synced and (self._decoder.losses > losses or not self._decoder.is_synced):
            raise MuxViolation("the guest sent bytes that are no frame")
        return list(changed.values())

    def _handle(self, frame: Frame) -> MuxStream | None:
        if frame.type == FrameType.HELLO:
            raise MuxViolation("the guest sent a HELLO in the middle of an epoch")
        if frame.type == FrameType.OPEN:
            raise MuxViolation("the guest opened a stream")
        stream = self._streams.get(frame.stream)
        if stream is None or stream.is_gone:
            if stream is None and frame.type == FrameType.DATA:
                self._refuse(frame.stream)
            return None
        match frame.type:
            case FrameType.DATA:
                stream._receive(frame.payload)
            case FrameType.WINDOW:
                stream._grant(frame.payload)
            case FrameType.CLOSE:
                stream.is_ended = True
                self.forget_if_over(stream)
            case _:
                stream._fail()
                self.forget(stream)
        return stream

    def _refuse(self, stream_id: int) -> None:
        # Of a stream that we reset, many frames may still be under way: one answer for each run of them.
        if len(self._refusals) < MAX_STREAMS and (not self._refusals or self._refusals[-1] != stream_id):
            self._refusals.append(stream_id)

    @property
    def has_output(self) -> bool:
        """True when `output` returns bytes."""
        return bool(self._turns or self._refusals)

    def output(self, limit: int) -> tuple[bytearray, list[MuxStream]]:
        """Take about `limit` bytes of frames, streams in turn, one DATA frame each.

        Also returns the streams whose last `write` has been taken whole.
        """
        batch = bytearray()
        done: list[MuxStream] = []
        while self._refusals and len(batch) < limit:
            batch += encode_frame(Frame(FrameType.RESET, self._refusals.popleft()))
        while self._turns and len(batch) < limit:
            stream = self._turns.popleft()
            if stream._take(batch):
                done.append(stream)
        return batch, done

    def fail(self) -> list[MuxStream]:
        """End the epoch: every stream is gone. Returns them."""
        streams = list(self._streams.values())
        for stream in streams:
            stream._fail()
        self._streams.clear()
        self._turns.clear()
        self._refusals.clear()
        return streams

    # -- for streams -----------------------------------------------------------------------------------------------

    def queue(self, stream: MuxStream) -> None:
        """Give a stream a turn."""
        self._turns.append(stream)

    def forget(self, stream: MuxStream) -> None:
        """Drop a stream from the table."""
        self._streams.pop(stream.id, None)

    def forget_if_over(self, stream: MuxStream) -> None:
        """Drop a stream that both sides have closed."""
        if stream.is_over:
            self.forget(stream)
