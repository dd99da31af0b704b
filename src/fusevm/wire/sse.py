"""Server-sent events (WHATWG HTML, section 9.2): encode, and parse incrementally."""

from typing import NamedTuple

KEEPALIVE = b": keepalive\n\n"


class Message(NamedTuple):
    """One server-sent message. `data` is one line of JSON in this API."""

    data: str
    id: str = ""
    event: str = ""


def encode_message(data: bytes, id: str = "") -> bytes:  # noqa: A002 - the field's name in the specification
    """One message; `data` must not contain a line break. Without `id` the reader's last id stays."""
    return (f"id: {id}\n".encode() if id else b"") + b"data: " + data + b"\n\n"


class MessageDecoder:
    """Cuts a byte stream into messages; comments and unknown fields are skipped."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[str] = []
        self._id = ""
        self._event = ""

    def feed(self, chunk: bytes) -> list[Message]:
        """Add bytes; return the messages that are complete now."""
        self._buffer += chunk
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        found = [self._line(bytes(line).rstrip(b"\r").decode("utf-8", "replace")) for line in lines]
        return [message for message in found if message is not None]

    def _line(self, line: str) -> Message | None:
        if not line:
            return self._flush()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "data":
                self._data.append(value)
            case "id":
                self._id = value
            case "event":
                self._event = value
            case _:
                pass
        return None

    def _flush(self) -> Message | None:
        message = Message("\n".join(self._data), self._id, self._event) if self._data else None
        self._data, self._event = [], ""
        return message
