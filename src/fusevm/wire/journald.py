"""Log lines to systemd's journal with their fields, so that one machine's life is found by one of them.

`journalctl FUSE_MACHINE=<id>`: everything about a machine; `FUSE_UID=<uid>`: everything about an environment, also what
the control plane says. The text is the line that would have been printed. Only for a program whose standard error is
the journal (JOURNAL_STREAM, systemd.exec(5)); what the journal does not take is printed there.

Native protocol: datagrams of `NAME=value\\n`, or for values with line breaks `NAME\\n`, length (64 bits,
little-endian), value, `\\n`. Names: upper case letters, digits, underscores, not first; at most 64.
"""

import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

import structlog

SOCKET: Final = Path("/run/systemd/journal/socket")
_PREFIX: Final = "FUSE_"
_MAX_NAME: Final = 64
#: syslog(3)
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_NO_NAME: Final = re.compile(r"[^A-Z0-9_]")
#: Said by the journal itself.
_OWN: Final = frozenset({"level", "timestamp"})


def is_journal(environ: Mapping[str, str], stream: TextIO | None = None) -> bool:
    """Does this stream lead into the journal? `JOURNAL_STREAM` has its device and inode."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    if not device.isdecimal() or not inode.isdecimal():
        return False
    try:
        found = os.fstat((stream or sys.stderr).fileno())
    except (OSError, ValueError):
        return False
    return (found.st_dev, found.st_ino) == (int(device), int(inode))


def render_entry(message: str, fields: Mapping[str, object], identifier: str) -> bytes:
    """One datagram. Fields that are nothing are left out."""
    parts = [
        _render("MESSAGE", message),
        _render("PRIORITY", str(_PRIORITIES.get(str(fields.get("level", "info")), 6))),
        _render("SYSLOG_IDENTIFIER", identifier),
    ]
    parts += [
        _render(field_name(name), str(value))
        for name, value in fields.items()
        if name not in _OWN and value is not None and value != ""
    ]
    return b"".join(parts)


def field_name(name: str) -> str:
    """The journal's name of a field of a log line."""
    return f"{_PREFIX}{_NO_NAME.sub('_', name.upper())}"[:_MAX_NAME]


def _render(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return f"{name}=".encode() + data + b"\n"
    return f"{name}\n".encode() + struct.pack("<Q", len(data)) + data + b"\n"


class WithFields:
    """The last processor: renders a line as another does, and keeps its fields for `JournalLogger`."""

    def __init__(self, renderer: "structlog.typing.Processor") -> None:
        self._renderer = renderer

    def __call__(
        self, logger: Any, name: str, event: "structlog.typing.EventDict"
    ) -> tuple[tuple[str, dict[str, object]], dict[str, object]]:
        fields = dict(event)
        return (str(self._renderer(logger, name, event)), fields), {}


class JournalLogger:
    """Takes lines with their fields. A line is never lost for the journal's sake: it is printed then."""

    def __init__(self, identifier: str, path: Path = SOCKET, stream: TextIO | None = None) -> None:
        self._identifier = identifier
        self._path = str(path)
        self._stream = stream or sys.stderr
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def msg(self, message: str, fields: Mapping[str, object]) -> None:
        """Send one line; nobody waits for the journal."""
        try:
            self._socket.sendto(render_entry(message, fields, self._identifier), socket.MSG_DONTWAIT, self._path)
        except OSError:
            self._stream.write(message + "\n")
            self._stream.flush()

    log = debug = info = warning = warn = error = critical = fatal = exception = failure = err = msg

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


def choose_output(
    renderer: "structlog.typing.Processor", printing: Any, identifier: str, environ: Mapping[str, str]
) -> "tuple[structlog.typing.Processor, Any]":
    """The last processor and the logger factory of a program: the journal's, or what prints."""
    if not is_journal(environ) or not SOCKET.exists():
        return renderer, printing
    logger = JournalLogger(identifier)
    return WithFields(renderer), lambda *_arguments: logger
