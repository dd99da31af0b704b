"""What every call is made of: what goes out, how the answer is read, when it may be sent again."""

import base64
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from fusevm.model.errors import Error, IdempotencyInProgress, ShuttingDown, StoreFull
from fusevm.sdk.failures import ConnectionLost, ProtocolBroken, ServerUnreachable
from fusevm.wire.errors import parse_error

T = TypeVar("T")

#: The server waits at most 55 s for what takes long; its answer is then under way.
WAIT_TIMEOUT_S = 75.0
#: The answer to an upload comes after the machine has written it to its disk.
UPLOAD_TIMEOUT_S = 600.0
QUICK_TIMEOUT_S = 30.0
JSON = "application/json"
OCTETS = "application/octet-stream"
_PAUSES_S = (0.05, 0.2, 0.6)
_UNREACHABLE_TRIES = 2
#: Tries, at most one per second, to learn the answer of a request that is still under way.
_IN_PROGRESS_TRIES = 64


class Retry(Enum):
    """When a call may be sent again after a failure on the way."""

    #: Repeating it changes nothing: by its nature, or by its Idempotency-Key.
    ALWAYS = "always"
    #: Only when it surely never arrived.
    UNSENT = "unsent"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What goes out. `target` is path and query, percent-encoded."""

    method: str
    target: str
    headers: Mapping[str, str] = {}
    body: bytes | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back. Header names are lower case."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""


class Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One exchange: request, how to read its answer, how long to wait, whether to repeat."""

    request: Request
    #: Turns a 2xx answer into the result.
    read: Callable[[Answer], T]
    retry: Retry
    #: Seconds of silence before the call is given up.
    timeout_s: float = QUICK_TIMEOUT_S
    #: Errors by which a *repetition* says that the first try had worked.
    done_by: tuple[type[Error], ...] = ()

    def result(self, answer: Answer) -> T:
        """The typed body of an answer. Raises the error that the server sent, or ProtocolBroken."""
        raise_for_status(answer)
        return self.read(answer)


def raise_for_status(answer: Answer) -> None:
    """Raise the model's error for an answer that is no success; its note names the request id."""
    if 200 <= answer.status < 300:
        return
    error = parse_error(answer.status, answer.body)
    if request_id := answer.headers.get("x-request-id"):
        error.add_note(f"request id {request_id}")
    raise error


def may_repeat(call: Call[Any], error: Error) -> bool:
    """May this call be sent again after this error?"""
    if isinstance(error, ServerUnreachable | ShuttingDown | StoreFull):
        return True  # surely not carried out
    return call.retry is Retry.ALWAYS and isinstance(error, ConnectionLost | IdempotencyInProgress)


def pause_s(call: Call[Any], error: Error, attempt: int, jitter: float) -> float | None:
    """Seconds to wait before try number `attempt` (1 is the first repetition), `jitter` in 0..1; None: give up."""
    if not may_repeat(call, error):
        return None
    if isinstance(error, IdempotencyInProgress):
        return min(attempt * 0.1, 1.0) if attempt <= _IN_PROGRESS_TRIES else None
    # Who refuses connections will mostly go on to do so, and people wait for this answer.
    tries = _UNREACHABLE_TRIES if isinstance(error, ServerUnreachable) else len(_PAUSES_S)
    return _PAUSES_S[attempt - 1] * (0.5 + jitter) if attempt <= tries else None


def is_done(call: Call[Any], error: Error, attempt: int) -> bool:
    """True when a repetition was answered by what the first, lost answer had made true."""
    return attempt > 0 and isinstance(error, call.done_by)


# -- reading answers -----------------------------------------------------------------------------------------------


def json_reader(kind: type[T]) -> Callable[[Answer], T]:
    """A reader of JSON bodies of one type."""
    decoder = msgspec.json.Decoder(kind)

    def read(answer: Answer) -> T:
        try:
            return decoder.decode(answer.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolBroken(url="the server", problem=f"body: {error}") from error

    return read


def read_nothing(answer: Answer) -> None:
    """A reader for answers without a body."""
    del answer


def read_text(answer: Answer) -> str:
    """A reader of plain text."""
    return answer.body.decode("utf-8", "replace")


# -- writing requests ----------------------------------------------------------------------------------------------


def make_target(*segments: str, query: Mapping[str, str | int | bool | None] | None = None) -> str:
    """A target below /v1: segments are encoded, query values of None or "" left out."""
    path = "/v1/" + "/".join(quote(segment, safe="") for segment in segments)
    pairs = {name: _text(value) for name, value in (query or {}).items() if value is not None and value != ""}
    return f"{path}?{urlencode(pairs)}" if pairs else path


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_json(value: object) -> bytes:
    """JSON of a body; None and unset fields are left out, as the contract wants."""
    return msgspec.json.encode(_without_none(msgspec.to_builtins(value)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return value


def to_b64(data: bytes) -> str:
    """Bytes as JSON can carry them."""
    return base64.b64encode(data).decode()


def post(target: str, body: object = None, *, key: str = "", headers: Mapping[str, str] | None = None) -> Request:
    """A POST of a JSON body, if there is one; `key` is its Idempotency-Key."""
    fields = dict(headers or {})
    if key:
        fields["Idempotency-Key"] = key
    if body is None:
        return Request(method="POST", target=target, headers=fields)
    return Request(method="POST", target=target, headers=fields | {"Content-Type": JSON}, body=to_json(body))


def get(target: str, kind: type[T]) -> Call[T]:
    """A GET of a JSON body. Safe to repeat."""
    return Call(request=Request(method="GET", target=target), read=json_reader(kind), retry=Retry.ALWAYS)
