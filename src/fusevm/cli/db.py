"""`fuse db`: the control plane's database, from outside: check it, bring its schema up to date, copy it."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from fusevm.cli import settings
from fusevm.cli.failures import CliError
from fusevm.cli.options import State, output_options
from fusevm.cli.output import format_bytes, is_terminal, print_json, say
from fusevm.cli.places import data_option, find_places
from fusevm.cli.setting_options import config_option, settings_options

_NAMES = ("database_url", "token_encryption_key", "token_encryption_key_previous")
SETTINGS = tuple(setting for setting in settings.CONTROL if setting.name in _NAMES)
DATABASE = tuple(setting for setting in SETTINGS if setting.name == "database_url")
SOUND, DAMAGED, UNUSABLE = 0, 1, 2
_VERDICTS = {SOUND: "sound", DAMAGED: "damaged", UNUSABLE: "unusable"}


@click.group()
def db() -> None:
    """Check, migrate and back up the control plane's database.

    Which one: DATABASE_URL, --database-url or the settings file; else that of `fuse up` on this machine.
    """


@db.command()
@data_option
@config_option
@settings_options(SETTINGS)
@output_options
def check(*, state: State, data: str | None, config_file: Path | None, **flags: Any) -> int:
    """Look for damage, with a remedy for everything found. Changes nothing; safe beside a running control plane.

    Checked are: the schema and its checksums, the file's integrity (SQLite), every record against its columns, what
    belongs to nothing, the invariants of the whole, and whether the secrets can be opened with the given key.

    Exit code 0: sound; 1: damaged; 2: it cannot be used or reached.
    """
    from fusevm.control.store import offline  # noqa: PLC0415 - the control plane's weight is only for this command

    loaded = settings.load("control", flags, os.environ, config_file)
    with loaded.naming_sources():
        database = _database(loaded, data, state)
        sealer = _sealer(loaded, database)
        findings = asyncio.run(offline.check(database, sealer))
    status = UNUSABLE if any(found.is_fatal for found in findings) else DAMAGED if findings else SOUND
    if state.is_json:
        print_json({"verdict": _VERDICTS[status], "secrets_tried": sealer is not None, "findings": findings})
        return status
    for found in findings:
        mark = click.style(found.kind, fg="red") if is_terminal(sys.stdout) else found.kind
        click.echo(f"{mark}: {found.problem}\n  -> {found.remedy}")
    if sealer is None and status != UNUSABLE:
        say("The secrets were not tried: no key was given (TOKEN_ENCRYPTION_KEY).")
    click.echo(f"The database is {_VERDICTS[status]}.")
    return status


def _database(loaded: settings.Loaded, data: str | None, state: State) -> str:
    """The database that was named, else that of `fuse up` on this machine, if there is one."""
    local = find_places(data, state.environ).control / "fuse.db"
    return str(loaded["database_url"] or (local if local.exists() else ""))


def _sealer(loaded: settings.Loaded, database: str) -> Any:
    """Opens the secrets, if there is a key: the given one, or the one beside the SQLite file."""
    from fusevm.control.secrets import Sealer, load_key  # noqa: PLC0415 - as above
    from fusevm.control.store.location import is_postgres, sqlite_path  # noqa: PLC0415 - as above

    key, previous = loaded["token_encryption_key"], loaded["token_encryption_key_previous"]
    old = [bytes.fromhex(text) for text in previous]
    if key:
        return Sealer(bytes.fromhex(key), old)
    if is_postgres(database) or not Path(sqlite_path(database) + ".key").exists():
        return None
    return Sealer(load_key("", sqlite_path(database)), old)


@db.command()
@data_option
@config_option
@settings_options(DATABASE)
@output_options
def migrate(*, state: State, data: str | None, config_file: Path | None, **flags: Any) -> None:
    """Bring the schema up to date, all of it or nothing. The control plane does the same when it starts.

    Replicas of a control plane over PostgreSQL may run meanwhile; a SQLite file must not be in use.
    """
    from fusevm.control.store import offline  # noqa: PLC0415 - as above

    loaded = settings.load("control", flags, os.environ, config_file)
    with loaded.naming_sources():
        applied = asyncio.run(offline.migrate(_database(loaded, data, state)))
    if state.is_json:
        print_json({"applied": applied})
        return
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("The schema is up to date.")


@db.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@data_option
@config_option
@settings_options(DATABASE)
@output_options
def backup(
    *, state: State, file: Path | None, force: bool, data: str | None, config_file: Path | None, **flags: Any
) -> None:
    """Copy the database to FILE while the control plane runs. Default: fuse-<time>.db, or .dump for PostgreSQL.

    The file is complete or absent, and readable by its owner alone. A SQLite backup is put in the place of the
    database while the control plane is stopped. For PostgreSQL `pg_dump` makes the file, which `pg_restore` takes. The
    encryption key is not part of it: keep it elsewhere.
    """
    from fusevm.control.store.location import is_postgres  # noqa: PLC0415 - as above
    from fusevm.control.store.offline import backup_sqlite, file_of  # noqa: PLC0415 - as above

    loaded = settings.load("control", flags, os.environ, config_file)
    with loaded.naming_sources():
        database = _database(loaded, data, state)
        source = None if is_postgres(database) else file_of(database)
        name = time.strftime("fuse-%Y%m%d-%H%M%S") + (".db" if source is not None else ".dump")
        target = file or Path(name)
        if target.exists() and not force:
            raise CliError(f"{target} exists already", hint="name another file, or say --force")
        size = dump_postgres(database, target) if source is None else backup_sqlite(source, target)
    if state.is_json:
        print_json({"file": str(target), "size_bytes": size})
        return
    click.echo(f"{target} ({format_bytes(size)})")
    if source is not None and Path(f"{source}.key").exists():
        say(f"Keep {source}.key, too, and elsewhere: without it the secrets in the backup cannot be opened.")


def dump_postgres(url: str, target: Path) -> int:
    """Let pg_dump write the file; its size. Raises CliError, with the command to run, where there is no pg_dump."""
    from fusevm.control.store.postgres import without_password  # noqa: PLC0415 - as above

    place, password = without_password(url)
    program = shutil.which("pg_dump")
    command = ["pg_dump", "--format=custom", "--no-owner", f"--file={target}", place]
    if program is None:
        shown = " ".join(command[:-1]) + f" '{place}'"
        raise CliError("pg_dump is not installed", hint=f"install postgresql-client, or run elsewhere: {shown}")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    command[0], command[3] = program, f"--file={partial}"
    # Not as an argument: those are visible to others.
    environ = {**os.environ, **({"PGPASSWORD": password} if password else {})}
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
        if done.returncode != 0:
            raise CliError(f"pg_dump failed: {done.stderr.strip()}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size
