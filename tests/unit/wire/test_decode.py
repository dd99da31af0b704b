"""JSON bodies in: errors name the field, and what nobody knows is listed."""

import msgspec
import pytest

from fusevm.model.errors import BadJson
from fusevm.wire.decode import decode_body
from fusevm.wire.rest import CreateRequest


class Leaf(msgspec.Struct, frozen=True):
    size: int = 0


class Tree(msgspec.Struct, frozen=True):
    name: str = ""
    leaf: Leaf | None = None
    leaves: list[Leaf] = []
    table: dict[str, str] = {}
    by_name: dict[str, Leaf] = {}
    either: Leaf | str = ""
    renamed: int = msgspec.field(default=0, name="otherName")


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_an_empty_body_is_an_empty_object(body: bytes):
    assert decode_body(body, Tree) == (Tree(), [])


def test_known_fields_are_decoded_and_none_is_unknown():
    body = b'{"name":"a","leaf":{"size":1},"leaves":[{"size":2}],"table":{"any":"key"},"otherName":3}'
    value, unknown = decode_body(body, Tree)
    assert value == Tree(name="a", leaf=Leaf(1), leaves=[Leaf(2)], table={"any": "key"}, renamed=3)
    assert unknown == []


@pytest.mark.parametrize(
    ("body", "unknown"),
    [
        (b'{"nmae":"a"}', ["nmae"]),
        (b'{"zeta":1,"alpha":2}', ["alpha", "zeta"]),
        (b'{"leaf":{"sise":1}}', ["leaf.sise"]),
        (b'{"leaf":null}', []),
        (b'{"renamed":1}', ["renamed"]),
        (b'{"leaves":[{"size":1},{"sise":2}]}', ["leaves.1.sise"]),
        (b'{"by_name":{"a":{"size":1},"b":{"sise":2}}}', ["by_name.b.sise"]),
        (b'{"either":"x"}', []),
        (b'{"either":{"sise":1}}', ["either.sise"]),
    ],
)
def test_unknown_fields_are_named_with_their_path(body: bytes, unknown: list[str]):
    assert decode_body(body, Tree)[1] == unknown


def test_a_list_at_the_top_is_walked_too():
    assert decode_body(b'[{"size":1},{"sise":2}]', list[Leaf]) == ([Leaf(1), Leaf(0)], ["1.sise"])
    assert decode_body(b"[1]", list[int]) == ([1], [])


def test_a_union_at_the_top_is_walked_too():
    assert decode_body(b'{"sise":2}', Leaf | None) == (Leaf(0), ["sise"])  # type: ignore[arg-type]
    assert decode_body(b"null", Leaf | None) == (None, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"leaf":{"size":"big"}}', r"\$\.leaf\.size"),
        (b'{"leaves":[{"size":1},{"size":null}]}', r"\$\.leaves\[1\]\.size"),
        (b"\xff", "JSON|invalid"),
        (b'{"name":"\xff"}', "utf-8|UTF-8"),
        (b"[" * 100_000, "recursion|depth|truncated"),
    ],
)
def test_a_body_that_does_not_fit_names_the_place(body: bytes, problem: str):
    with pytest.raises(BadJson, match=problem):
        decode_body(body, Tree)


def test_a_typo_in_a_create_is_found():
    body = b'{"task_id":"t","spec":{"memory_mb":512,"cpus":1},"netwrok":{}}'
    value, unknown = decode_body(body, CreateRequest)
    assert value.task_id == "t"
    assert unknown == ["netwrok", "spec.memory_mb"]
