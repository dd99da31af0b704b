"""Event streams (server-sent events). Every message comes from the store, in order and without a gap; a signal only
says when to look. A slow reader is read for at its own pace, so nothing is buffered for it and nothing dropped.

- Without Last-Event-ID, the first message of a live environment's stream is its present state and has no id.
- With it, what came after that event is replayed.
- An ended environment is replayed from its first event, or from Last-Event-ID; the stream ends after the terminal
  event, which therefore always arrives.
- Old events are not kept: a replay begins with the first one that is, whose number says what is missing.
"""

import asyncio
from collections.abc import AsyncGenerator
from functools import partial

import msgspec

from fusevm.control.plane import Plane
from fusevm.control.render import parse_event_id, render_event, render_present
from fusevm.control.signals import Subscription
from fusevm.control.store.protocol import Position, StoredFact
from fusevm.model.environment import TERMINAL, Environment
from fusevm.model.errors import BadField
from fusevm.model.fact import Fact, Kind
from fusevm.wire.rest import EventBody
from fusevm.wire.sse import KEEPALIVE, encode_message

#: Facts read at once.
PAGE = 100
_encode = msgspec.json.Encoder().encode
#: Next line, line and paragraph separator: no line breaks in an event stream or in JSON, but readers in Python that use
#: `str.splitlines`, httpx and with it the contract's SDK among them, break lines there. ASCII ones JSON escapes anyway.
_LINE_BREAKS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")


async def stream_environment(plane: Plane, uid: str, after_seq: int | None) -> AsyncGenerator[bytes, None]:
    """Messages of one environment until its end. `after_seq`: replay what came after; None: begin with the present."""
    with plane.signals.subscribe(uid) as news, plane.metrics.event_streams.track_inprogress():
        record = await plane.store.get(uid)
        if record is None:
            return
        if after_seq is None and not record.is_terminal:
            yield _present(record)
            after_seq = record.event_seq
        seq = min(after_seq or 0, record.event_seq)
        if record.is_terminal and seq == record.event_seq:
            yield _present(record)  # nothing is left to replay, but the reader must learn of the end
            return
        is_replay, sign_due_s = True, _next_sign_s(plane)
        while True:
            here = partial(plane.store.facts_of, uid, seq, PAGE)
            facts, messages = await plane.fanout.look((uid, seq), here, _message)
            if facts:
                _measure(plane, facts, is_replay=is_replay)
                yield messages
                sign_due_s = _next_sign_s(plane)
                seq = facts[-1].fact.seq
                if _is_end(facts[-1].fact):
                    return
            elif plane.closing.is_set():
                return
            elif await _is_quiet(news, sign_due_s):
                yield KEEPALIVE
                sign_due_s = _next_sign_s(plane)
            is_replay = is_replay and bool(facts)


async def stream_all(plane: Plane, position: Position, tenant: str | None = None) -> AsyncGenerator[bytes, None]:
    """Messages of all environments after a place in the global order, without end."""
    with plane.signals.subscribe() as news, plane.metrics.event_streams.track_inprogress():
        yield KEEPALIVE  # the reader sees that the stream is open
        is_replay, sign_due_s = True, _next_sign_s(plane)
        while not plane.closing.is_set():
            here = partial(plane.store.facts_after, position, PAGE, tenant)
            facts, messages = await plane.fanout.look((position, tenant), here, _message)
            if facts:
                _measure(plane, facts, is_replay=is_replay)
                yield messages
                sign_due_s = _next_sign_s(plane)
                position = facts[-1].position
            elif await _is_quiet(news, sign_due_s):
                yield KEEPALIVE
                sign_due_s = _next_sign_s(plane)
            is_replay = is_replay and bool(facts)


def _next_sign_s(plane: Plane) -> float:
    """When a stream that has just said something must give a sign of life, by the event loop's clock."""
    return asyncio.get_running_loop().time() + plane.config.keepalive_s


async def _is_quiet(news: Subscription, sign_due_s: float) -> bool:
    """Wait for a change. True: a sign of life is due; changes of which this stream tells nothing do not put it off."""
    loop = asyncio.get_running_loop()
    return not await news.changed(sign_due_s - loop.time()) or loop.time() >= sign_due_s


def _measure(plane: Plane, facts: list[StoredFact], *, is_replay: bool) -> None:
    """How late are they? Old ones that somebody asked for are not late."""
    if not is_replay:
        now_ms = plane.clock.now_ms()
        for stored in facts:
            plane.metrics.event_lag_seconds.observe(max(0, now_ms - stored.fact.at_ms) / 1000)


async def start_position(plane: Plane, last_event_id: str) -> Position:
    """Where a stream of everything begins. Raises BadField for an id that is malformed or no longer kept."""
    if not last_event_id:
        return await plane.store.last_position()
    uid, seq = parse_last_id(last_event_id)
    found = await plane.store.position_of(uid, seq)
    if found is None:
        raise BadField(
            field="Last-Event-ID", problem=f"the event {last_event_id[:80]!r} is not kept; begin without an id"
        )
    return found


def parse_last_id(text: str) -> tuple[str, int]:
    """(uid, seq) of a Last-Event-ID. Raises BadField."""
    parsed = parse_event_id(text)
    if parsed is None:
        raise BadField(field="Last-Event-ID", problem=f"{text[:80]!r} is not the id of an event")
    return parsed


def encode_event(body: EventBody) -> bytes:
    """An event as one message of a stream."""
    data = _encode(body)
    for raw, escaped in _LINE_BREAKS:
        data = data.replace(raw, escaped)
    return encode_message(data, body.id)


def _present(record: Environment) -> bytes:
    return encode_event(render_present(record))


def _message(stored: StoredFact) -> bytes:
    return encode_event(render_event(stored.fact, stored.task_id))


def _is_end(fact: Fact) -> bool:
    return fact.kind is Kind.STATE and fact.state in TERMINAL
