"""Records as text and rows."""

import pytest
from fake_api import make_environment

from fusevm.console.config import is_loopback
from fusevm.console.render import (
    TAIL_BYTES,
    Tail,
    environment_path,
    render_environment,
    render_event,
    render_host,
    render_memory,
    render_output,
    render_terminal_text,
    render_verdict,
)
from fusevm.console.theme import IS_DARK, NEXT, Theme, parse_theme
from fusevm.wire.rest import EventBody, ExecAnswer, HostBody, ResourcesBody

NOON_S = 1_767_323_045.0  # 2026-01-02T03:04:05Z


@pytest.mark.parametrize(
    ("mib", "text"),
    [
        (512, "512 MiB"),
        (1024, "1 GiB"),
        (1536, "1.5 GiB"),
        (1 << 20, "1 TiB"),
        (1 << 30, "1,024 TiB"),
        (1100, "1.1 GiB"),
    ],
)
def test_memory_reads_well(mib: int, text: str) -> None:
    assert render_memory(mib) == text


def test_the_row_of_an_environment() -> None:
    row = render_environment(make_environment("a"), NOON_S + 90)
    assert (row["id"], row["href"], row["state"]) == ("fuse-a", "/environments/fuse-a?uid=01uida", "running")
    assert (row["ram_text"], row["age_text"], row["is_ended"]) == ("512 MiB", "1m", False)


def test_addresses_cannot_be_left_by_an_id() -> None:
    one = make_environment("../x?y")
    assert environment_path(one) == "/environments/fuse-..%2Fx%3Fy?uid=01uid..%2Fx%3Fy"


def test_the_row_of_a_host_has_shares() -> None:
    host = HostBody(
        id="h",
        url="u",
        state="active",
        health="ok",
        capacity=ResourcesBody(cpus=8, ram_mb=4096, storage_gb=0),
        allocated=ResourcesBody(cpus=2, ram_mb=8192, storage_gb=4, vm_count=3),
    )
    row = render_host(host, NOON_S)
    assert (row["cpus"], row["ram"], row["disk"]) == (0.25, 1.0, 0.0)
    assert (row["cpus_text"], row["ram_text"]) == ("2 of 8", "8 GiB of 4 GiB")
    assert (row["machines_text"], row["seen_text"]) == ("3", "never")


def test_an_event_is_one_line_with_everything() -> None:
    event = EventBody(
        id="u.7", event="state", vm_id="fuse-a", uid="u", state="failed", reason="r", data={"k": "v"}, updated_at="T"
    )
    assert render_event(event) == "T  #7  state  state=failed reason=r k=v"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (ExecAnswer(exit_code=3, stdout="", stderr="", duration_ms=12), "exit status 3, 12 ms"),
        (ExecAnswer(exit_code=137, stdout="", stderr="", signal="KILL"), "ended by KILL, 0 ms"),
        (ExecAnswer(exit_code=124, stdout="", stderr="", timed_out=True), "stopped at its time limit, 0 ms"),
    ],
)
def test_how_a_command_ended(answer: ExecAnswer, text: str) -> None:
    assert render_verdict(answer) == text


def test_only_the_end_of_much_output_is_shown_and_that_is_said() -> None:
    assert render_output(b"abc", 3) == "abc"
    text = render_output(b"x" * TAIL_BYTES + b"end", 1 << 30)
    assert text.startswith(f"[the last {TAIL_BYTES} of {1 << 30} bytes]\nxxx")
    assert text.endswith("end")


def test_a_tail_keeps_the_end() -> None:
    tail = Tail()
    for _ in range(3):
        tail.add(b"y" * TAIL_BYTES)
    tail.add(b"end")
    assert tail.text.startswith(f"[the last {TAIL_BYTES} of {3 * TAIL_BYTES + 3} bytes]\ny")
    assert tail.text.endswith("yend")


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (b"\x1b[1;31mred\x1b[0m\r\nnext", "red\nnext"),
        (b"\x1b]0;title\x07after \x1b]8;;http://x\x1b\\link", "after link"),
        (b"\x1b(Bplain\x1b=\x1bM", "plain"),
        (b"bell\x07 back\x08 tab\t \x7f\x00.", "bell back tab\t ."),
        (b"\xff\xfe caf\xc3\xa9 <b>", "�� café <b>"),
        (b"cut off \x1b[12", "cut off 12"),
    ],
)
def test_what_is_meant_for_a_terminal_becomes_plain_text(output: bytes, text: str) -> None:
    assert render_terminal_text(output) == text


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.5", True),
        ("::1", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("x", False),
    ],
)
def test_only_loopback_addresses_are_local(host: str, *, is_local: bool) -> None:
    assert is_loopback(host) is is_local


def test_themes_go_round_and_unknown_ones_are_automatic() -> None:
    assert [parse_theme(text) for text in ("dark", "", "<script>")] == [Theme.DARK, Theme.AUTO, Theme.AUTO]
    assert NEXT[NEXT[NEXT[Theme.AUTO]]] is Theme.AUTO
    assert {IS_DARK[theme] for theme in Theme} == {None, True, False}
