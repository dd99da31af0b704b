"""Known values are masked, wherever a text is cut."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fusevm.core.redaction import MASK, MOST, Redactor
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


def masked(values: list[str], text: bytes) -> bytes:
    """What it comes to: all characters of all occurrences are masked, one mask where they overlap."""
    content, until = b"", 0
    for at in range(len(text)):
        end = max((at + len(value) for value in values if text.startswith(value.encode(), at)), default=at)
        content += b"" if at < until else MASK if end > at else text[at : at + 1]
        until = max(until, end)
    return content


@given(texts())
def test_no_value_comes_through_however_the_text_is_cut(found: tuple[list[str], list[bytes]]) -> None:
    values, pieces = found
    text, content, stream = b"".join(pieces), b"", Redactor(values).stream()
    for piece in pieces:
        content += stream.feed(piece)
        assert stream.fed - stream.passed < max(map(len, values)), "only what may begin a value is held back"
        again = Redactor(values).stream(told=stream.passed)
        assert content + again.feed(text) + again.end() == masked(values, text), "another one goes on here"
    content += stream.end()
    assert stream.passed == len(text)
    assert content == masked(values, text)
    assert Redactor(values).text(text.decode()) == content.decode()


def test_values_that_overlap_themselves_are_masked_to_their_end() -> None:
    assert Redactor(["abcabcab"]).text("abcabcabcab, abcabcabcabcab") == "***, ***"


def test_values_that_are_known_later_are_masked_from_then_on() -> None:
    stream = Redactor(["hush-hush"]).stream()
    assert stream.feed(b"hush-hush, hu") == b"***, "
    stream.use(Redactor(["hush-hush", "hurdy-gurdy"]))
    assert stream.feed(b"rdy-gurdy") + stream.end() == b"***"


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


@pytest.mark.parametrize("over", [0, 1, 7, 8, 9])
def test_a_long_value_is_masked_to_its_last_character(over: int) -> None:
    value = "".join(f"{number:07}ß" for number in range(MOST // 4))[: 2 * MOST] + "0123456789"[:over]
    assert set(Redactor([value]).text(f"<{value}>")) == set("<*>")
    stream = Redactor([value]).stream()
    content = b"".join(stream.feed(value.encode()[at : at + 100]) for at in range(0, 5 * MOST, 100)) + stream.end()
    assert set(content) == set(b"*")


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


def cost_s(redactor: Redactor, pieces: list[bytes]) -> float:
    """Of the most expensive piece."""
    stream, most = redactor.stream(), 0.0
    for piece in pieces:
        began = time.process_time()
        stream.feed(piece)
        most = max(most, time.process_time() - began)
    return most


@pytest.mark.parametrize("value", ["a" * 60_000, "a" * 30_000 + "b" + "a" * 30_000])
def test_a_value_that_resembles_itself_costs_little(value: str) -> None:
    text = (b"a" * 59_999 + b"b") * 3
    assert cost_s(Redactor([value]), [text[at : at + 4_096] for at in range(0, len(text), 4_096)]) < 0.2


@pytest.mark.parametrize(
    "lines",
    [
        [f"{number:08x}" for number in range(115_000)],
        [f"AAAAAAAA{number:05}" for number in range(80_000)],
        ["A" * size for size in range(8, 1_440)],
    ],
    ids=["different", "alike", "nested"],
)
def test_many_values_cost_what_few_cost(lines: list[str]) -> None:
    redactor = Redactor(["\n".join(lines)])
    noise = b"".join(b"%016x\n" % number for number in range(100_000, 102_000))
    for text in (noise, b"A" * 40_000, (b"A" * 1_000 + b"B") * 40):
        assert cost_s(redactor, [text[at : at + 4_096] for at in range(0, len(text), 4_096)]) < 0.2
    assert redactor.text(f"{lines[-1]} and {lines[7]}!") == "*** and ***!"


def test_what_a_daemon_and_a_check_say_of_themselves_is_masked() -> None:
    redactor = Redactor(["hunter2-hunter2"])
    agent = AgentStatus(state=AgentState.FAILED, restarts=3, message="bad token hunter2-hunter2")
    health = HealthStatus(state=Verdict.FAILING, failures=2, message="GET /?key=hunter2-hunter2: 403")
    assert redactor.agent(agent) == replace(agent, message="bad token ***")
    assert redactor.health(health) == replace(health, message="GET /?key=***: 403")
