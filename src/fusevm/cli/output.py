"""Data to stdout: tables for people, JSON for programs. Everything else goes to stderr.

On a terminal tables are drawn by rich, which is imported only then. In a pipe they are plain columns without colour.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

_COLOURS = {
    "running": "green",
    "ok": "green",
    "active": "green",
    "provisioning": "yellow",
    "draining": "yellow",
    "destroying": "yellow",
    "paused": "yellow",
    "cordoned": "yellow",
    "unreachable": "red",
    "lost": "red",
    "failed": "red",
}


def print_json(value: Any) -> None:
    """One JSON document, indented."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    print(text.decode())


def print_json_line(value: Any) -> None:
    """One JSON document on one line, written at once."""
    print(msgspec.json.encode(value).decode(), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with headings."""
    if is_terminal(sys.stdout):
        _print_rich(columns, rows)
    else:
        _print_plain(columns, rows)


def print_record(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def _print_plain(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [tuple(column.upper() for column in columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - 50 ms that pipes do without
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.upper(), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    Console(highlight=False).print(table)


def say(text: str) -> None:
    """A word to the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)


def is_terminal(stream: Any) -> bool:
    """Is this stream a terminal that takes more than plain text?"""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def format_bytes(size: float) -> str:
    """A size in binary units, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
