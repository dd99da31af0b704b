"""The little of DNS that a forwarder must understand (RFC 1035 section 4): header and question.

Everything else in a message passes through untouched.

Header, big-endian:

| offset | size | field |
|---|---|---|
| 0 | 2 | id |
| 2 | 2 | flags: QR 0x8000, opcode 0x7800, RD 0x0100, RA 0x0080, response code 0x000f |
| 4 | 2 | number of questions |
| 6 | 6 | numbers of answer, authority and additional records |
"""

import struct

import msgspec

HEADER_BYTES = 12
#: Longest message over TCP, whose length field has 16 bits.
MAX_MESSAGE_BYTES = 65535
SERVFAIL = 2
REFUSED = 5

_HEADER = struct.Struct("!HHHHHH")
_QR, _OPCODE, _RD, _RA = 0x8000, 0x7800, 0x0100, 0x0080
_MAX_LABEL_BYTES = 63
_MAX_NAME_BYTES = 255
_TYPE_AND_CLASS_BYTES = 4


class Question(msgspec.Struct, frozen=True):
    """What was asked; equal questions are equal but for the case of the name (RFC 4343)."""

    name: bytes
    type_and_class: bytes


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """One well-formed query."""

    id: int
    question: Question
    message: bytes

    def with_id(self, number: int) -> bytes:
        """Return the message with another id."""
        return number.to_bytes(2, "big") + self.message[2:]


def parse_query(message: bytes) -> Query | None:
    """Read a standard query with one question; None for anything else, which deserves no answer."""
    if len(message) < HEADER_BYTES:
        return None
    number, flags, questions, answers, authorities, _ = _HEADER.unpack_from(message)
    if flags & (_QR | _OPCODE) or questions != 1 or answers or authorities:
        return None
    question = _parse_question(message)
    return None if question is None else Query(id=number, question=question, message=message)


def is_answer(message: bytes, number: int, question: Question) -> bool:
    """Tell whether a message answers this question under this id."""
    if len(message) < HEADER_BYTES:
        return False
    got, flags, questions, *_ = _HEADER.unpack_from(message)
    return got == number and bool(flags & _QR) and questions == 1 and _parse_question(message) == question


def render_failure(query: Query, code: int) -> bytes:
    """Make an answer without records."""
    flags = int.from_bytes(query.message[2:4], "big") & _RD | _QR | _RA | code
    end = HEADER_BYTES + len(query.question.name) + _TYPE_AND_CLASS_BYTES
    return _HEADER.pack(query.id, flags, 1, 0, 0, 0) + query.message[HEADER_BYTES:end]


def _parse_question(message: bytes) -> Question | None:
    """Read the first question; its name is the first in the message and therefore never compressed."""
    position = HEADER_BYTES
    while position < len(message) and message[position]:
        if message[position] > _MAX_LABEL_BYTES:
            return None
        position += 1 + message[position]
    end = position + 1 + _TYPE_AND_CLASS_BYTES
    name = message[HEADER_BYTES : position + 1]
    if end > len(message) or len(name) > _MAX_NAME_BYTES:
        return None
    # Length bytes are at most 63, below the letters, so they stay as they are.
    return Question(name.lower(), message[position + 1 : end])
