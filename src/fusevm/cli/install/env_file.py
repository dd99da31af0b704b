"""Files of `VARIABLE=value` lines as systemd reads them (systemd.exec(5), EnvironmentFile=).

What an administrator has written stays: comments, other variables, their order.
"""

import re
from collections.abc import Mapping
from pathlib import Path

_LINE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,=~-]*")
_ESCAPED = re.compile(r'[\\"`$]')


def read_installed(path: Path = Path("/etc/fuse/host.env")) -> dict[str, str]:
    """The settings of the installed host daemon; none without one, or for who may not read them."""
    try:
        return parse_env(path.read_text())
    except OSError:
        return {}


def parse_env(text: str) -> dict[str, str]:
    """The variables; the last of a name counts."""
    found = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match and not line.lstrip().startswith(("#", ";")):
            found[match[1]] = _unquote(match[2].strip())
    return found


def render_env(text: str, values: Mapping[str, str]) -> str:
    """The file with these variables set, each where it stood; new ones at the end. Idempotent."""
    left = dict(values)
    lines = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None or line.lstrip().startswith(("#", ";")) or match[1] not in values:
            lines.append(line)
        elif match[1] in left:
            lines.append(_render(match[1], left.pop(match[1])))
    lines += [_render(name, value) for name, value in left.items()]
    return "".join(f"{line}\n" for line in lines)


def _render(name: str, value: str) -> str:
    if _PLAIN.fullmatch(value):
        return f"{name}={value}"
    return f'{name}="{_ESCAPED.sub(lambda found: chr(92) + found[0], value)}"'


def _unquote(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    return re.sub(r"\\(.)", r"\1", text)
