"""What is said in an interactive session, without any I/O: frames out, frames in, the process id and the end."""

import msgspec

from fusevm.model.errors import Error
from fusevm.sdk.failures import ProtocolBroken
from fusevm.wire.errors import parse_error
from fusevm.wire.frames import BadFrame, Frame, FrameType, decode_message, encode_frame
from fusevm.wire.guest import ExecRequest, Exit

_OUTPUT = (FrameType.STDOUT, FrameType.STDERR)
_STATUS_OF_CODE = {
    "invalid_argument": 400,
    "not_found": 404,
    "conflict": 409,
    "unimplemented": 501,
    "unavailable": 503,
    "timeout": 504,
}


class _Started(msgspec.Struct):
    pid: int = 0


class _Code(msgspec.Struct):
    code: str = ""


class Exchange:
    """One session's state. `pid` comes with STARTED, `exit` with EXIT."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._parts = bytearray()
        self.pid: int | None = None
        self.exit: Exit | None = None

    def start(self, request: ExecRequest) -> Frame:
        """The first frame of the client."""
        return Frame(FrameType.START, msgspec.json.encode(request))

    def resize(self, rows: int, cols: int) -> Frame:
        """A new terminal size; sizes of 0, as some terminals report them, become 1."""
        size = {"rows": min(max(rows, 1), 65535), "cols": min(max(cols, 1), 65535)}
        return Frame(FrameType.RESIZE, msgspec.json.encode(size))

    def signal(self, name: str) -> Frame:
        """A signal by its name, with or without SIG, or by its number."""
        return Frame(FrameType.SIGNAL, msgspec.json.encode({"signal": name.removeprefix("SIG")}))

    def encode(self, frame: Frame) -> bytes:
        """The WebSocket message of a frame."""
        return encode_frame(frame)

    def join(self, part: bytes, *, is_last: bool) -> bytes:
        """Add a fragment; the whole message with its last one, else b""."""
        if is_last and not self._parts:
            return part
        self._parts += part
        if not is_last:
            return b""
        message = bytes(self._parts)
        self._parts.clear()
        return message

    def feed(self, message: bytes) -> list[Frame]:
        """Take a message; return it as a list if it is output. Raises the error of an ERROR frame, ProtocolBroken."""
        try:
            frame = decode_message(message)
            match frame.type:
                case FrameType.STARTED:
                    self.pid = msgspec.json.decode(frame.payload, type=_Started).pid
                case FrameType.EXIT:
                    self.exit = msgspec.json.decode(frame.payload, type=Exit)
                case FrameType.ERROR:
                    raise _to_error(frame.payload)
                case _:
                    pass
        except (BadFrame, msgspec.DecodeError) as error:
            raise ProtocolBroken(url=self._url, problem=str(error)) from error
        return [frame] if frame.type in _OUTPUT else []


def _to_error(payload: bytes) -> Error:
    code = msgspec.json.decode(payload, type=_Code).code
    return parse_error(_STATUS_OF_CODE.get(code, 500), payload)
