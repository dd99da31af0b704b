"""The journal's SQL: numbered schema files, and named queries in `queries.sql`."""

from __future__ import annotations

import re
from importlib.resources import files

_HERE = files(__name__)
_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load_queries() -> dict[str, str]:
    """The named queries; each is one statement."""
    _, *parts = _NAME.split((_HERE / "queries.sql").read_text())
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def load_migrations() -> list[str]:
    """The schema scripts in order; the first makes schema 1."""
    names = sorted(path.name for path in _HERE.iterdir() if re.fullmatch(r"\d{4}_\w+\.sql", path.name))
    return [(_HERE / name).read_text() for name in names]
