"""Masks known secret values in what comes out of a guest: events, errors, logs.

Pure. A value is known as it was given, as JSON writes it, and line by line; shorter ones than `LEAST` characters are
left alone, since they turn up everywhere. What a program encodes or makes up itself is not known and not masked.
"""

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

import msgspec
from msgspec.structs import replace

from fusevm.model.setup import AgentStatus, HealthStatus

MASK = b"***"
#: Characters; at least as many bytes.
LEAST = 8
#: Characters. A longer value is known in pieces, of which each is masked: less is held back, and compared at once.
MOST = 2_048


class Redactor:
    """Masks these values. Where they overlap, all of their characters are masked."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self.needles = _Needles(piece.encode() for value in values for piece in _pieces(value))

    def text(self, text: str) -> str:
        """A whole text."""
        stream = self.stream()
        content = stream.feed(text.encode(errors="surrogatepass")) + stream.end()
        return content.decode(errors="surrogatepass")

    def stream(self, offset: int = 0, told: int = 0) -> "RedactedStream":
        """A text that arrives in pieces, of which the first one begins at `offset`. What comes before may have been
        the beginning of a value: the rest of that line is left out. What is before `told` is read and not passed on."""
        return RedactedStream(self.needles, offset, told)

    def agent(self, status: AgentStatus) -> AgentStatus:
        """What a daemon's state says."""
        return replace(status, message=self.text(status.message))

    def health(self, status: HealthStatus) -> HealthStatus:
        """What a health check's verdict says."""
        return replace(status, message=self.text(status.message))


class RedactedStream:
    """Masks values across the boundaries of pieces: an end that may be the beginning of a value is held back."""

    def __init__(self, needles: "_Needles", offset: int, told: int) -> None:
        self._needles = needles
        self._told = told
        self._held = b""
        #: How much of what is held is masked: the mask was passed on before.
        self._masked = 0
        self._is_within_line = bool(needles.longest and offset)
        #: Offset in the original after what was passed on, and after what was fed.
        self.passed = self.fed = offset

    def use(self, redactor: Redactor) -> None:
        """From now on, mask what this one masks."""
        self._needles = redactor.needles

    def feed(self, piece: bytes) -> bytes:
        """What may be passed on now."""
        self.fed += len(piece)
        if self._is_within_line:
            _, newline, piece = piece.partition(b"\n")
            self._is_within_line = not newline
        data = self._held + piece
        return self._pass_on(data, *self._needles.find(data, is_end=False))

    def end(self) -> bytes:
        """The rest: nothing comes after it."""
        return self._pass_on(self._held, *self._needles.find(self._held, is_end=True))

    def _pass_on(self, data: bytes, found: list[tuple[int, int]], until: int) -> bytes:
        """Everything up to `until`, before which the values that were found begin."""
        told = self._told - (self.fed - len(data))
        content, masked = bytearray(), self._masked
        for begin, end in found:
            if begin >= masked:
                content += data[max(masked, told) : max(begin, told)]
                content += MASK if begin >= told else b""
            masked = max(masked, end)
        content += data[max(masked, told, 0) : max(until, told, 0)]
        self._masked = max(0, masked - until)
        self._held = data[until:]
        self.passed = self.fed - len(self._held)
        return bytes(content)


class _Needles:
    """Finds values in a text. How many there are hardly matters: they are looked up by their first `LEAST` bytes, and
    those that begin alike by bisection."""

    def __init__(self, forms: Iterable[bytes]) -> None:
        self._sorted = sorted(set(forms))
        self.longest = max(map(len, self._sorted), default=0)
        #: First bytes, as a number, to the place of the first needle that begins with them.
        self._places: dict[int, int] = {}
        #: For each needle: the lengths of the needles that it begins with, ascending, its own included.
        self._lengths: list[tuple[int, ...]] = []
        within: list[bytes] = []
        lengths: tuple[int, ...] = ()
        equal: dict[tuple[int, ...], tuple[int, ...]] = {}
        for place, needle in enumerate(self._sorted):
            self._places.setdefault(_number(needle), place)
            while within and not needle.startswith(within[-1]):
                within.pop()
            within.append(needle)
            lengths = (*lengths[: len(within) - 1], len(needle))
            self._lengths.append(equal.setdefault(lengths, lengths))

    def find(self, data: bytes, *, is_end: bool) -> tuple[list[tuple[int, int]], int]:
        """Where values begin and end, the longest at each place, and up to where that is certain: there begins what
        may become one."""
        if not self._sorted:
            return [], len(data)
        found: list[tuple[int, int]] = []
        for at in self._candidates(data):
            length = self._longest_at(data, at, is_end=is_end)
            if length is None:
                return found, at
            if length:
                found.append((at, at + length))
        short = range(0 if is_end else max(0, len(data) - LEAST + 1), 0 if is_end else len(data))
        return found, next((at for at in short if self._is_beginning(data[at:])), len(data))

    def _candidates(self, data: bytes) -> list[int]:
        """Places with the first bytes of a needle. All words of eight bytes are compared, one alignment at a time."""
        found = []
        for shift in range(min(LEAST, max(0, len(data) - LEAST + 1))):
            size = (len(data) - shift) // LEAST * LEAST
            words = memoryview(data)[shift : shift + size].cast("Q")
            if not self._places.keys().isdisjoint(words):
                found += [shift + LEAST * place for place, word in enumerate(words) if word in self._places]
        return sorted(found)

    def _longest_at(self, data: bytes, at: int, *, is_end: bool) -> int | None:
        """Length of the longest needle here; 0: none; None: more data may make it a longer one."""
        text = data[at : at + self.longest]
        first = self._places[_number(text)]
        place = bisect_right(self._sorted, text, first)
        if not is_end and place < len(self._sorted) and self._sorted[place].startswith(text):
            return None
        if place == first:
            return 0
        # Whatever the text begins with, the needle before its place in the order begins with, too.
        before, lengths = self._sorted[place - 1], self._lengths[place - 1]
        fitting = bisect_left(lengths, True, key=lambda length: not text.startswith(before[:length]))
        return lengths[fitting - 1] if fitting else 0

    def _is_beginning(self, text: bytes) -> bool:
        place = bisect_left(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)


def _number(text: bytes) -> int:
    """The first bytes as the machine's own order has them."""
    return int.from_bytes(text[:LEAST], sys.byteorder)


def _pieces(value: str) -> Iterator[str]:
    """What is looked for: the forms of a value; long ones in pieces, the last one of which is not too short."""
    for form in _forms(value):
        begins = [*range(0, len(form) - LEAST + 1, MOST), len(form)]
        yield from (form[begin:end] for begin, end in pairwise(begins))


def _forms(value: str) -> set[str]:
    """How a value may be written. Line by line: terminals and prefixes of log lines come between lines."""
    return {value, msgspec.json.encode(value).decode()[1:-1], *(line.strip() for line in value.splitlines())}
