"""What the setting of the database names: a SQLite file, memory, or a PostgreSQL server."""

MEMORY = ":memory:"
SQLITE_SCHEME = "sqlite://"
POSTGRES_SCHEMES = ("postgres://", "postgresql://")


def is_postgres(database: str) -> bool:
    """Does the setting name a PostgreSQL database?"""
    return database.startswith(POSTGRES_SCHEMES)


def sqlite_path(database: str) -> str:
    """The file that the setting names: a path, or `sqlite://` and a path; or `:memory:`."""
    return database.removeprefix(SQLITE_SCHEME) or MEMORY
