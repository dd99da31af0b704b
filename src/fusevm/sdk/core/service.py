"""Calls about the server itself."""

from typing import Generic, TypeVar

from fusevm.sdk.core.exchange import Answer, Call, Request, Retry, get, json_reader, make_target, raise_for_status
from fusevm.wire.rest import Ready, Version

T = TypeVar("T")


def get_version() -> Call[Version]:
    """Name and version of the server; needs no token."""
    return get(make_target("version"), Version)


def get_ready() -> Call[Ready]:
    """Whether the server can do its work. Not ready is an answer, not an error; needs no token."""
    read = json_reader(Ready)

    def read_any(answer: Answer) -> Ready:
        return read(answer)

    call = Call(request=Request(method="GET", target="/ready"), read=read_any, retry=Retry.ALWAYS, timeout_s=5.0)
    return _accepting(call, 503)


class _AcceptingCall(Call[T], Generic[T], frozen=True, kw_only=True):
    """A call for which one more status is a success."""

    accepted: int

    def result(self, answer: Answer) -> T:
        if answer.status != self.accepted:
            raise_for_status(answer)
        return self.read(answer)


def _accepting(call: Call[T], status: int) -> Call[T]:
    return _AcceptingCall(
        request=call.request, read=call.read, retry=call.retry, timeout_s=call.timeout_s, accepted=status
    )
