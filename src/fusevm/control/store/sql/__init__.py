"""The store's SQL texts: numbered migrations, and named queries that SQLite and PostgreSQL both take."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_FILE = re.compile(r"(?P<version>\d{4})_\w+\.sql")


class Migration(NamedTuple):
    """One step of the schema."""

    version: int
    name: str
    text: str
    checksum: str


def load_queries() -> dict[str, str]:
    """Name to statement."""
    parts = _NAME.split((_HERE / "queries.sql").read_text())[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def load_migrations() -> list[Migration]:
    """All migrations in order."""
    found = []
    for path in sorted(_HERE.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match:
            text = path.read_text()
            found.append(Migration(int(match["version"]), path.name, text, hashlib.sha256(text.encode()).hexdigest()))
    return found
