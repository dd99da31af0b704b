"""The store's SQL texts: numbered migrations, and named queries. One text for SQLite and PostgreSQL: a line that ends
with `-- sqlite` or `-- postgres` is left out for the other."""

import functools
import hashlib
import re
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_FILE = re.compile(r"(?P<version>\d{4})_\w+\.sql")


class Dialect(StrEnum):
    """Which database a text is for."""

    SQLITE = "sqlite"
    POSTGRES = "postgres"


class Migration(NamedTuple):
    """One step of the schema."""

    version: int
    name: str
    statements: tuple[str, ...]
    #: SHA-256 of the file: the same in both databases.
    checksum: str


def render(text: str, dialect: Dialect) -> str:
    """The lines of one database, without comments."""
    lines = []
    for line in text.splitlines():
        code, _, comment = line.partition("--")
        if code.strip() and comment.strip() in ("", dialect):
            lines.append(code.rstrip())
    rendered = "\n".join(lines)
    # Keys are ordered by their bytes, whatever the database's locale is.
    return rendered.replace("collate binary", 'collate "C"') if dialect is Dialect.POSTGRES else rendered


@functools.cache
def load_queries(dialect: Dialect) -> dict[str, str]:
    """Name to statement; those that are only for the other database are left out."""
    parts = _NAME.split((_HERE / "queries.sql").read_text())[1:]
    texts = {name: render(text, dialect) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    return {name: text for name, text in texts.items() if text}


def load_migrations(dialect: Dialect) -> list[Migration]:
    """All migrations in order."""
    found = []
    for path in sorted(_HERE.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match:
            text = path.read_text()
            # The files hold no text literals with semicolons.
            statements = tuple(part.strip() for part in render(text, dialect).split(";") if part.strip())
            checksum = hashlib.sha256(text.encode()).hexdigest()
            found.append(Migration(int(match["version"]), path.name, statements, checksum))
    return found
