"""Log lines as journald takes them, by a real socket."""

import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from fusevm.wire.journald import JournalLogger, WithFields, choose_output, field_name, is_journal, render_entry


def parse_entry(data: bytes) -> dict[str, str]:
    """Read a datagram of the native protocol as journald does."""
    fields = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.settimeout(10)
        yield listening


def test_a_line_arrives_with_the_machine_as_a_field(journal: socket.socket, tmp_path: Path):
    logger = JournalLogger("fuse-host", tmp_path / "socket")
    processors = [structlog.processors.add_log_level, WithFields(structlog.processors.JSONRenderer())]
    log = structlog.wrap_logger(logger, processors=processors, wrapper_class=structlog.make_filtering_bound_logger(0))
    log.bind(machine="m-1", uid="u-1").warning("boot_failed", problem="two\nlines", empty="", nothing=None)
    entry = parse_entry(journal.recv(65536))
    logger.close()
    assert entry["FUSE_MACHINE"] == "m-1"
    assert entry["FUSE_UID"] == "u-1"
    assert entry["FUSE_EVENT"] == "boot_failed"
    assert entry["FUSE_PROBLEM"] == "two\nlines"
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("4", "fuse-host")
    assert '"machine": "m-1"' in entry["MESSAGE"]
    assert not {"FUSE_EMPTY", "FUSE_NOTHING", "FUSE_LEVEL"} & set(entry)


def test_a_value_cannot_forge_a_field():
    entry = parse_entry(render_entry("x", {"problem": "a\nFUSE_MACHINE=m-2\nMESSAGE=y"}, "fuse-host"))
    assert set(entry) == {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "FUSE_PROBLEM"}
    assert entry["MESSAGE"] == "x"


@pytest.mark.parametrize(
    ("name", "expected"), [("machine", "FUSE_MACHINE"), ("a.b-c", "FUSE_A_B_C"), ("x" * 99, "FUSE_" + "X" * 59)]
)
def test_names_are_such_as_the_journal_takes(name: str, expected: str):
    assert field_name(name) == expected


def test_what_the_journal_does_not_take_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logger = JournalLogger("fuse-host", tmp_path / "nobody", sys.stderr)
    logger.msg('{"event": "x"}', {"event": "x"})
    logger.close()
    assert capsys.readouterr().err == '{"event": "x"}\n'


def test_only_a_stream_that_leads_there_is_the_journal(tmp_path: Path):
    with (tmp_path / "file").open("w") as stream:
        found = os.fstat(stream.fileno())
        assert is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, stream)
        assert not is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"}, stream)
        assert not is_journal({}, stream)
        assert not is_journal({"JOURNAL_STREAM": "x:y"}, stream)


def test_elsewhere_lines_are_printed_as_before():
    renderer, printing = structlog.processors.JSONRenderer(), structlog.WriteLoggerFactory(file=sys.stderr)
    assert choose_output(renderer, printing, "fuse-host", {}) == (renderer, printing)
