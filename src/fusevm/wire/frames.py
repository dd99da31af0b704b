"""Exec frames: the bytes of interactive commands, the same on guest streams and on WebSockets.

| offset | size | field |
|---|---|---|
| 0 | 1 | type |
| 1 | 3 | reserved, zero |
| 4 | 4 | payload length, big-endian, at most 1048576 |
| 8 | n | payload |

Types 0 to 4 are the contract's attach framing. Specification and golden file: docs/guest-protocol.md section 3.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct(">B3sI")
_RESERVED = bytes(3)
MAX_PAYLOAD = 1 << 20


class FrameType(IntEnum):
    """What a frame carries and who sends it (client or agent)."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    RESIZE = 3
    EXIT = 4
    SIGNAL = 5
    STDIN_EOF = 6
    STARTED = 7
    ERROR = 8
    START = 9


class Frame(NamedTuple):
    """One exec frame."""

    type: FrameType
    payload: bytes = b""


class BadFrame(ValueError):
    """The bytes are no exec frame; the connection cannot go on."""


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame. Raises BadFrame for a payload over the limit."""
    if len(frame.payload) > MAX_PAYLOAD:
        raise BadFrame(f"payload of {len(frame.payload)} bytes is over {MAX_PAYLOAD}")
    return HEADER.pack(frame.type, _RESERVED, len(frame.payload)) + frame.payload


class FrameDecoder:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Add bytes; return the frames that are complete now. Raises BadFrame."""
        self._buffer += data
        frames: list[Frame] = []
        offset = 0
        while len(self._buffer) - offset >= HEADER.size:
            kind, reserved, length = HEADER.unpack_from(self._buffer, offset)
            end = offset + HEADER.size + _checked(kind, reserved, length)
            if len(self._buffer) < end:
                break
            frames.append(Frame(FrameType(kind), bytes(self._buffer[offset + HEADER.size : end])))
            offset = end
        del self._buffer[:offset]
        return frames

    @property
    def is_between_frames(self) -> bool:
        """True when no half frame is waiting."""
        return not self._buffer


def decode_message(message: bytes) -> Frame:
    """The one frame in a WebSocket message. Raises BadFrame."""
    if len(message) < HEADER.size:
        raise BadFrame(f"a frame has at least {HEADER.size} bytes, this message {len(message)}")
    kind, reserved, length = HEADER.unpack_from(message)
    if _checked(kind, reserved, length) != len(message) - HEADER.size:
        raise BadFrame(f"the header announces {length} bytes, the message carries {len(message) - HEADER.size}")
    return Frame(FrameType(kind), message[HEADER.size :])


def _checked(kind: int, reserved: bytes, length: int) -> int:
    if reserved != _RESERVED:
        raise BadFrame("the reserved bytes of a frame header are zero")
    if kind not in FrameType._value2member_map_:
        raise BadFrame(f"unknown frame type {kind}")
    if length > MAX_PAYLOAD:
        raise BadFrame(f"payload of {length} bytes is over {MAX_PAYLOAD}")
    return length
