"""Bytes of somebody who means harm: whole ones, mutated. Seeded, so that every run is the same (`fuzz_rounds`)."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import fuzz_rounds

GOLDEN = Path(__file__).parent / "golden"
#: In CI; the corpus below comes on top.
ROUNDS = 500

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
#: Answers of an agent, with what parsers have choked on: lengths that lie, endless heads, depth, no UTF-8, smuggling.
ANSWERS = (
    _HEAD + b'content-length: 61\r\n\r\n{"protocol":"1.1","version":"x","nonce":"n","uptime_ms":1234}',
    _HEAD + b'transfer-encoding: chunked\r\n\r\n5\r\n{"pro\r\n9\r\ntocol":1}\r\n0\r\n\r\n',
    _HEAD + b"content-length: 99999999999999999999\r\n\r\n{}",
    _HEAD + b"content-length: -1\r\n\r\n{}",
    _HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}x",
    _HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    _HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    _HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\n{}\r\n",
    _HEAD + b"content-length: 200000\r\n\r\n" + b"[" * 200_000,
    _HEAD + b'content-length: 200007\r\n\r\n{"a":' + b'{"a":' * 40_000 + b"1}",
    _HEAD + b'content-length: 14\r\n\r\n{"nonce":"\xff\xfe"}',
    _HEAD + b"content-length: 4\r\n\r\nnull",
    _HEAD + b"x: " + b"a" * 100_000,
    b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: 1\r\n" % number for number in range(20_000)),
    b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: fuse-frames/1\r\nconnection: upgrade\r\n\r\n\x07\x00\x00\x00",
    b'HTTP/1.1 500 No\r\ncontent-length: 38\r\n\r\n{"error":"x","code":"internal","d":[1]}',
    b"HTTP/1.0 200 OK\r\n\r\n{}",
    b"HTTP/9.9 999\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"",
)


def golden_frames() -> list[bytes]:
    """The frames of docs/guest-protocol.md."""
    return [bytes.fromhex(frame["hex"]) for frame in json.loads((GOLDEN / "mux_frames.json").read_text())["frames"]]


def golden_exec_frames() -> list[bytes]:
    """The frames of interactive commands."""
    return [bytes.fromhex(frame["hex"]) for frame in json.loads((GOLDEN / "exec_frames.json").read_text())["frames"]]


def mutants(corpus: tuple[bytes, ...] | list[bytes], rounds: int = ROUNDS) -> Iterator[tuple[str, bytes]]:
    """The corpus as it is, then mutations of it, each with what makes it again."""
    for number, whole in enumerate(corpus):
        yield f"corpus {number}", whole
    for seed, chance in fuzz_rounds.rounds("seed", rounds):
        yield seed, mutate(chance, list(corpus))


def mutate(chance: random.Random, corpus: list[bytes]) -> bytes:
    """A few whole ones joined, then damaged."""
    data = bytearray(b"".join(chance.choice(corpus)[:4096] for _ in range(chance.randint(1, 4))))
    for _ in range(chance.randint(0, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 40))
            case 2:
                del data[at : at + chance.randint(1, 40)]
            case 3:
                data[at : at + 4] = chance.choice((b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00"))
            case 4:
                data[at:at] = data[max(0, at - 64) : at]
            case _:
                del data[at:]
    return bytes(data)


def pieces(chance: random.Random, data: bytes) -> Iterator[bytes]:
    """The same bytes, as they may arrive."""
    at = 0
    while at < len(data):
        size = chance.choice((1, 7, 100, 5000, len(data)))
        yield data[at : at + size]
        at += size
