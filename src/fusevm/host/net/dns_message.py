"""The little of DNS that a forwarder must understand (RFC 1035 section 4): header and question.

A machine with the whole Internet gets answers untouched. Where only some names are allowed, questions and answers are
made anew from what was understood of them, so that nothing else travels in them.

Header, big-endian:

| offset | size | field |
|---|---|---|
| 0 | 2 | id |
| 2 | 2 | flags: QR 0x8000, opcode 0x7800, RD 0x0100, RA 0x0080, response code 0x000f |
| 4 | 2 | number of questions |
| 6 | 6 | numbers of answer, authority and additional records |
"""

import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address

import msgspec

HEADER_BYTES = 12
#: Longest message over TCP, whose length field has 16 bits.
MAX_MESSAGE_BYTES = 65535
NOERROR = 0
SERVFAIL = 2
NXDOMAIN = 3
REFUSED = 5
#: Of a question: IPv4 address, class Internet.
TYPE_A_CLASS_IN = b"\x00\x01\x00\x01"

_HEADER = struct.Struct("!HHHHHH")
_QR, _OPCODE, _TC, _RD, _RA, _CODE = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x000F
_A, _CNAME, _IN = 1, 5, 1
#: Type, class, time to live, length of the data.
_RECORD = struct.Struct("!HHIH")
_ADDRESS_BYTES = 4
#: A pointer to the name of the question (RFC 1035 section 4.1.4).
_THE_NAME = b"\xc0\x0c"
#: A name with more pointers than this goes in circles.
_MAX_POINTERS = 32
#: Links of a chain of aliases that are followed.
_MAX_ALIASES = 16
_MAX_LABEL_BYTES = 63
_MAX_NAME_BYTES = 255
_TYPE_AND_CLASS_BYTES = 4


class Question(msgspec.Struct, frozen=True):
    """What was asked; equal questions are equal but for the case of the name (RFC 4343)."""

    name: bytes
    type_and_class: bytes

    @property
    def text(self) -> str:
        """The name as people write it, without the dot at the end."""
        return _text(self.name)


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


def make_query(question: Question) -> Query:
    """Make a query that asks this and carries nothing else: no case of letters, no extension."""
    message = _HEADER.pack(0, _RD, 1, 0, 0, 0) + question.name + question.type_and_class
    return Query(id=0, question=question, message=message)


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer says about the question's name."""

    code: int
    #: The answer did not fit: ask again over TCP.
    is_truncated: bool = False
    addresses: tuple[str, ...] = ()
    #: Seconds; of the record that ends first, aliases included.
    ttl: int = 0


def read_addresses(message: bytes, question: Question) -> Addresses:
    """Follow the aliases from the question's name to its addresses. ValueError for an answer that is no answer.

    Records about other names, and of other types, count for nothing.
    """
    try:
        _, flags, _, answers, *_ = _HEADER.unpack_from(message)
        records = list(_read_records(message, answers))
    except (struct.error, IndexError) as e:
        raise ValueError(f"the answer ends too early ({e})") from e
    code = flags & _CODE
    name = _text(question.name)
    ttls: list[int] = []
    found: tuple[str, ...] = ()
    for _ in range(_MAX_ALIASES):
        here = [record for record in records if record.name == name]
        addresses = [record for record in here if record.kind == _A]
        alias = next((record for record in here if record.kind == _CNAME), None)
        if addresses:
            ttls += [record.ttl for record in addresses]
            found = tuple(dict.fromkeys(record.value for record in addresses))
            break
        if alias is None:
            break
        ttls.append(alias.ttl)
        name = alias.value
    return Addresses(code=code, is_truncated=bool(flags & _TC), addresses=found, ttl=min(ttls, default=0))


def render_addresses(query: Query, addresses: Sequence[str], ttl: int) -> bytes:
    """Make an answer with addresses of the question's name, in the question's own spelling."""
    flags = int.from_bytes(query.message[2:4], "big") & _RD | _QR | _RA
    end = HEADER_BYTES + len(query.question.name) + _TYPE_AND_CLASS_BYTES
    head = _HEADER.pack(query.id, flags, 1, len(addresses), 0, 0) + query.message[HEADER_BYTES:end]
    fixed = _THE_NAME + _RECORD.pack(_A, _IN, ttl, _ADDRESS_BYTES)
    return head + b"".join(fixed + IPv4Address(address).packed for address in addresses)


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: int
    ttl: int
    #: An address, or the name behind an alias.
    value: str


def _read_records(message: bytes, count: int) -> Iterator[_Record]:
    """Read the addresses and aliases among the first records after the question."""
    _, position = _read_name(message, HEADER_BYTES)
    position += _TYPE_AND_CLASS_BYTES
    for _ in range(count):
        name, position = _read_name(message, position)
        kind, of_class, ttl, length = _RECORD.unpack_from(message, position)
        start, position = position + _RECORD.size, position + _RECORD.size + length
        if position > len(message):
            raise IndexError("record")
        if of_class == _IN and kind == _A and length == _ADDRESS_BYTES:
            yield _Record(name=name, kind=_A, ttl=ttl, value=str(IPv4Address(message[start:position])))
        elif of_class == _IN and kind == _CNAME:
            yield _Record(name=name, kind=_CNAME, ttl=ttl, value=_read_name(message, start)[0])


def _read_name(message: bytes, position: int) -> tuple[str, int]:
    """Read a name that may be compressed; return it and where the rest of the record begins."""
    labels: list[bytes] = []
    after = 0
    for _ in range(_MAX_NAME_BYTES + _MAX_POINTERS):
        length = message[position]
        if length > _MAX_LABEL_BYTES:
            if length < 0xC0:
                raise IndexError("label")
            after = after or position + 2
            position = int.from_bytes(message[position : position + 2], "big") & 0x3FFF
        elif length == 0:
            return b".".join(labels).lower().decode("latin-1"), after or position + 1
        else:
            # A dot within a label is none between two: `example.org` must not be one label.
            labels.append(message[position + 1 : position + 1 + length].replace(b".", b"\0"))
            position += 1 + length
    raise IndexError("name")


def _text(name: bytes) -> str:
    """A name of a question, which is never compressed."""
    return _read_name(name, 0)[0]


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
