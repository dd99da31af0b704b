"""Known values are masked, wherever a text is cut."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fusevm.core.redaction import MASK, Redactor
from fusevm.model.setup import AgentState, AgentStatus, HealthStatus, Verdict

#: Few letters, so that values overlap, contain and continue each other.
VALUE = st.text("ab", min_size=8, max_size=12)
NOISE = st.text("ab", max_size=9)


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[str], list[bytes]]:
    """Values, and a text with them in it, cut anywhere."""
    values = draw(st.lists(VALUE, min_size=1, max_size=3))
    text = "".join(draw(st.lists(st.sampled_from(values) | NOISE, max_size=8))).encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return values, [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(texts())
def test_no_value_comes_through_however_the_text_is_cut(found: tuple[list[str], list[bytes]]) -> None:
    values, pieces = found
    stream = Redactor(values).stream()
    content = b""
    for piece in pieces:
        content += stream.feed(piece)
        assert stream.fed - stream.passed < max(map(len, values)), "only what may begin a value is held back"
    content += stream.end()
    assert stream.passed == sum(map(len, pieces))
    assert not [value for value in values if value.encode() in content]
    assert not [value for value in values if value in Redactor(values).text(b"".join(pieces).decode())]


def test_the_longest_value_goes_first() -> None:
    redactor = Redactor(["password", "password-of-the-house"])
    assert redactor.text("a password-of-the-house, a password") == "a ***, a ***"
    stream = redactor.stream()
    assert stream.feed(b"a password-of") + stream.feed(b"-the-house!") == b"a ***!"


def test_what_cannot_become_a_value_is_passed_on_at_once() -> None:
    stream = Redactor(["hush-hush"]).stream()
    assert stream.feed(b"nothing to see\n") == b"nothing to see\n"
    assert stream.feed(b"$ hush") == b"$ "
    assert stream.feed(b"ed\n") == b"hushed\n"


def test_short_values_are_left_alone() -> None:
    assert Redactor(["1234567", ""]).text("1234567") == "1234567"
    assert Redactor(["12345678"]).text("12345678") == MASK.decode()


def test_a_value_is_known_as_json_and_line_by_line() -> None:
    redactor = Redactor(['say "hush" twice', "first line\nsecond line\n", "schlüssel-wörter"])
    assert redactor.text('{"A":"say \\"hush\\" twice"}') == '{"A":"***"}'
    assert redactor.text("1> first line\r\n2> second line\r\n") == "1> ***\r\n2> ***\r\n"
    assert redactor.text("die schlüssel-wörter") == "die ***"


def test_the_rest_of_a_line_whose_beginning_is_lost_is_left_out() -> None:
    stream = Redactor(["hush-hush"]).stream(100)
    assert stream.feed(b"ush-hu") == b""
    assert stream.feed(b"sh\nnext\n") == b"next\n"
    assert stream.passed == 114
    assert Redactor().stream(100).feed(b"ush-hush\nnext\n") == b"ush-hush\nnext\n", "nothing is hidden here"


@pytest.mark.parametrize("value", ["a" * 60_000, "a" * 30_000 + "b" + "a" * 30_000])
def test_a_value_that_resembles_itself_costs_little(value: str) -> None:
    stream, began = Redactor([value]).stream(), time.process_time()
    for _ in range(10):
        stream.feed(b"a" * 65_536)
    assert time.process_time() - began < 5


def test_what_a_daemon_and_a_check_say_of_themselves_is_masked() -> None:
    redactor = Redactor(["hunter2-hunter2"])
    agent = AgentStatus(state=AgentState.FAILED, restarts=3, message="bad token hunter2-hunter2")
    health = HealthStatus(state=Verdict.FAILING, failures=2, message="GET /?key=hunter2-hunter2: 403")
    assert redactor.agent(agent) == replace(agent, message="bad token ***")
    assert redactor.health(health) == replace(health, message="GET /?key=***: 403")
