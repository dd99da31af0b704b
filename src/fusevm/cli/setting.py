"""What a setting is, and how its text is read. The tables: `control_table`, `host_table`; the loader: `settings`."""

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|)")
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. `name` is its key in the settings file, within the table's section."""

    name: str
    env: str
    flag: str
    #: Text to value; raises ValueError with what would be right.
    parse: Callable[[str], Any]
    default: Any
    help: str
    #: Name of the program's own field, where it differs; its complaints are translated back.
    field: str = ""
    #: Never shown; as a flag it would be visible in the process list.
    is_secret: bool = False

    @property
    def is_switch(self) -> bool:
        """A flag without a value."""
        return self.parse is parse_bool


def parse_text(text: str) -> str:
    """Any text."""
    return text


def parse_bool(text: str) -> bool:
    """true, 1, yes, on, or their opposites."""
    match text.strip().lower():
        case "true" | "1" | "yes" | "on":
            return True
        case "false" | "0" | "no" | "off":
            return False
        case _:
            raise ValueError(f"{text!r} is neither true nor false")


def parse_listen(text: str) -> str:
    """`host:port`, `:port` (every address), `[::1]:port`; port 0: any free one."""
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if (
        not colon
        or not port.isascii()
        or not port.isdecimal()
        or int(port) > 65535
        or (":" in host and not is_bracketed)
    ):
        raise ValueError(f"{text!r} is not host:port; write 127.0.0.1:8080, :8080 or [::1]:8080")
    return text


def parse_key(text: str) -> str:
    """64 hex digits."""
    if not _HEX_KEY.fullmatch(text):
        raise ValueError("it must be 64 hex digits (32 bytes); `openssl rand -hex 32` makes one")
    return text.lower()


def parse_token(text: str) -> str:
    """Printable ASCII without spaces: what fits into a header."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a token is printable ASCII without spaces")
    return text


def parse_url(text: str) -> str:
    """An http, https or unix URL."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in ("http", "https", "unix") or not rest:
        raise ValueError(f"{text!r} is no URL; write http://127.0.0.1:8090, https://host:8090 or unix:///path")
    return text


def parse_database(text: str) -> str:
    """sqlite:///path, postgresql://..., or a path."""
    scheme, found, _ = text.partition("://")
    if found and scheme not in ("sqlite", "postgres", "postgresql"):
        raise ValueError(f"{scheme}:// is no database that we know; use sqlite:///path or postgresql://...")
    return text


def parse_cidrs(text: str) -> tuple[str, ...]:
    """Networks separated by commas."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(str(ipaddress.ip_network(item)))
        except ValueError as error:
            raise ValueError(f"{item!r} is no network; write 10.0.0.0/8, 2001:db8::/32 or 192.0.2.7") from error
    return tuple(found)


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def parse_path(text: str) -> Path:
    """A path, made absolute; `~` is the home directory."""
    return Path(text).expanduser().absolute()


def parse_number(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no number") from error
    if not 0 <= value < float("inf"):
        raise ValueError(f"{text} is out of range")
    return value


def parse_count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def parse_duration(text: str) -> float:
    """Seconds, as a number or as Go writes it: 90s, 5m, 1h30m, 500ms."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration; write 90s, 5m, 1h30m or 500ms")
    if len(parts) > 1 and any(not unit for _, unit in parts):
        raise ValueError(f"{text!r} has a number without a unit")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ValueError(f"{text} is out of range; it must be more than 0")
    return seconds


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser of fixed words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def parse_keys(text: str) -> tuple[str, ...]:
    """64 hex digits each, separated by commas."""
    return tuple(parse_key(name) for name in parse_names(text))


def parse_digest(text: str) -> str:
    """A SHA-256."""
    if not _HEX_KEY.fullmatch(text):
        raise ValueError(f"{text!r} is no SHA-256: 64 hex digits, as `sha256sum` prints")
    return text.lower()


def parse_web_url(text: str) -> str:
    """An http or https URL."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in ("http", "https") or not rest:
        raise ValueError(f"{text!r} is no URL; write https://example.com/file")
    return text


def parse_positive(text: str) -> int:
    """A whole number of at least 1."""
    if parse_count(text) < 1:
        raise ValueError(f"{text} is out of range; give at least 1")
    return int(text)


def parse_percent(text: str) -> int:
    """A whole number from 1 to 100."""
    if not 1 <= parse_count(text) <= 100:
        raise ValueError(f"{text} is no percentage; give 1 to 100")
    return int(text)


def parse_runtime(text: str) -> int:
    """Seconds, or `unlimited`: -1."""
    return -1 if text in ("unlimited", "-1") else parse_positive(text)


def parse_idle(text: str) -> int:
    """Seconds: 0 (never), or at least 60."""
    value = parse_count(text)
    if 0 < value < 60:
        raise ValueError(f"{text} is out of range; give 0 (never) or at least 60")
    return value


def parse_lease(text: str) -> int:
    """Seconds, 3 to 600: a lease outlives a short stall of the database, and a dead holder's work waits that long."""
    value = parse_count(text)
    if not 3 <= value <= 600:
        raise ValueError(f"{text} is out of range; give 3 to 600")
    return value


def parse_ratio(text: str) -> float:
    """A factor of at least 0.01."""
    value = parse_number(text)
    if not 0.01 <= value <= 1000:
        raise ValueError(f"{text} is out of range; give 0.01 to 1000, 1 for no overcommitment")
    return value
