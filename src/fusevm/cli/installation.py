"""An installation of Fuse in one folder: prepared, started, looked after, emptied. One `fuse up` at a time."""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

import msgspec

from fusevm.cli.addresses import choose_address
from fusevm.cli.connection import Context, context_path, remove_context, save_private
from fusevm.cli.failures import UNAVAILABLE, CliError
from fusevm.cli.places import Places
from fusevm.cli.processes import Identity, end, identify, is_running
from fusevm.cli.settings import Loaded
from fusevm.cli.stack import Program, Stack, StartFailed
from fusevm.model.errors import DataRootInUse, Error
from fusevm.sdk.client import Fuse

#: Where both programs listen when nothing was asked for and the port is free.
HOST_LISTEN, CONTROL_LISTEN = "127.0.0.1:8090", "127.0.0.1:8080"
#: The host daemon probes its driver at the first start.
HOST_START_S, CONTROL_START_S = 90.0, 30.0
HOST_HEALTHY_S = 30.0
_PREDECESSOR_S = 25.0


class UpRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`up.json`: who runs the installation. Remains after a crash, and is then out of date."""

    supervisor: Identity
    children: list[Identity] = []
    #: How to reach the control plane; empty until it serves.
    context: Context | None = None


class HostFile(msgspec.Struct, frozen=True, kw_only=True):
    """What the host daemon writes about itself (`host.json`)."""

    urls: list[str] = []
    driver: str = ""
    driver_reason: str = ""

    @property
    def url(self) -> str:
        """Where it listens on TCP."""
        return next((url for url in self.urls if not url.startswith("unix:")), "")


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A stack that serves."""

    context: Context
    driver: str
    driver_reason: str

    def describe(self, image: str) -> list[str]:
        """What a person needs to know."""
        why = f" ({self.driver_reason})" if self.driver_reason else ""
        return [
            f"URL     {self.context.url}",
            f"Token   {self.context.token}",
            f"Driver  {self.driver or 'unknown'}{why}",
            f"Data    {self.context.data_root}",
            f"Try     fuse run {image or 'IMAGE'} -- uname -a",
        ]


class Installation:
    """Holds the folder's lock from start to end. Use as a context manager: what was started ends with it.

    A start that is refused or interrupted leaves the folder as it was, but for kernels and images, which took long to
    make. One that fails for a reason unknown to us leaves its logs, and all that they may be about.
    """

    def __init__(self, places: Places, control: Loaded, host: Loaded, say: Callable[[str], None]) -> None:
        self.places = places
        self._control = control
        self._host = host
        self._say = say
        self._stack = Stack(say)
        self._lock: IO[str] | None = None
        self._running: Running | None = None
        self._has_served = False
        self._before = Before(self.places)

    def __enter__(self) -> Self:
        try:
            make_folders(self.places)
            self._lock = take_lock(self.places)
            end_predecessor(self.places, self._say)
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        del kind, trace
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """End what was started, and undo a start that came to nothing."""
        self._stack.__exit__()
        if self._lock is None:
            return  # the folder is somebody else's
        with self._lock:
            self.places.record.unlink(missing_ok=True)
            if error is None or self._running is not None or isinstance(error, StartFailed):
                return
            if self._has_served and self._before.is_new(self.places.host):
                self.remove_traces()
            self._before.restore()

    def prepare(self, image: str) -> None:
        """Make what machines are made from, where it is missing. Shows its progress."""
        from fusevm.cli.building import Narrator, carry_out, ensure_parts  # noqa: PLC0415 - builders load much
        from fusevm.cli.progress import Meter  # noqa: PLC0415 - as above

        with Meter() as meter:
            artefacts = self._host["artefact_root"] or self.places.data
            carry_out(ensure_parts(artefacts, self._host["kernel"], image, Narrator(meter)))

    def start(self) -> Running:
        """Start both programs and wait until they serve. Raises PortInUse, CliError."""
        host_listen = choose_address(self._host, "host_listen", HOST_LISTEN)
        listen = choose_address(self._control, "listen", CONTROL_LISTEN)
        self._save_record()
        save_settings(self.places, self._host)
        self._stack.start(self._host_program(host_listen), HOST_START_S)
        self._has_served = True
        self._save_record()
        found = self._read_host()
        token = read_or_make_token(self.places.token, self._control["auth_token"])
        ready_file = self.places.control / "ready"
        ready_file.unlink(missing_ok=True)
        self._stack.start(self._control_program(listen, token, found.url, ready_file), CONTROL_START_S)
        certificate = self._control["tls_cert"]
        context = Context(
            url=ready_file.read_text().strip(),
            token=token,
            ca_file=str(Path(certificate).absolute()) if certificate else "",
            pin_certificate=bool(certificate),
            data_root=str(self.places.data),
        )
        self._running = Running(context=context, driver=found.driver, driver_reason=found.driver_reason)
        self._save_record()
        self._wait_for_host()
        return self._running

    def check(self) -> None:
        """Start again what has ended; call it now and then."""
        if self._stack.check():
            self._save_record()

    def stop(self) -> None:
        """End both programs. Idempotent."""
        self._stack.stop()

    def client(self) -> Fuse:
        """A client of what runs. Proxies play no role."""
        if self._running is None:
            raise CliError("nothing runs", code=UNAVAILABLE)
        return local_client(self._running.context)

    def count_environments(self) -> int | None:
        """How many are live; None when nobody answers."""
        try:
            with self.client() as fuse:
                return sum(1 for _ in fuse.environments.list())
        except (Error, CliError):
            return None

    def destroy_all(self) -> None:
        """Destroy every environment and wait for their end. Raises CliError when one stays."""
        from fusevm.cli.removing import remove_all  # noqa: PLC0415 - threads, for this only

        with self.client() as fuse:
            ids = [one.id for one in fuse.environments.list()]
            if remove_all(fuse, ids, done=lambda env_id: self._say(f"{env_id} destroyed")):
                raise CliError("not every environment could be destroyed", hint="see above; `fuse down` tries again")

    def remove_traces(self) -> None:
        """Remove what the host daemon keeps on this machine for its next start. Only after everything has ended.

        Raises CliError when there are machines left.
        """
        from fusevm.cli import teardown  # noqa: PLC0415 - the daemon's parts are only for this
        from fusevm.cli.host_settings import host_config  # noqa: PLC0415 - as above

        config = msgspec.structs.replace(host_config(self._host, os.environ), data_root=self.places.host)
        if teardown.has_machines(config):
            raise CliError(f"machines are left below {self.places.host}", hint="`fuse down` tries again")
        teardown.remove_traces(config)
        self.places.settings.unlink(missing_ok=True)

    def vanish(self, *, is_whole: bool) -> None:
        """Destroy everything, end, and leave nothing, however far the start had come; kernels and images stay.

        `is_whole`: the folder itself goes, too. Raises CliError, with the data kept, when a machine stays.
        """
        if self._running is not None:
            self.destroy_all()
            remove_context(context_path(os.environ), self._running.context.url)
        self.stop()
        self.remove_traces()
        self._has_served = False
        places = self.places
        for folder in (places.data,) if is_whole else (places.host, places.control, places.logs):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (places.token, places.record, places.lock):
            file.unlink(missing_ok=True)

    # -- inside -------------------------------------------------------------------------------------------------

    def _host_program(self, listen: str) -> Program:
        marker = self.places.host / "host.json"
        marker.unlink(missing_ok=True)
        environ = to_environ(self._host) | {
            "FIRECRACKER_HOST_ROOT_DIR": str(self.places.host),
            "FUSE_ARTEFACT_ROOT": str(self._host["artefact_root"] or self.places.data),
            "FUSE_HOST_LISTEN": listen,
        }
        return Program(
            name="host daemon",
            command=fuse_command("host", "serve", "--config", os.devnull),
            environ=environ,
            log=self.places.logs / "host.log",
            is_ready=marker.exists,
        )

    def _control_program(self, listen: str, token: str, host_url: str, ready_file: Path) -> Program:
        uid = control_uid()
        if uid is not None:
            os.chown(self.places.control, uid, -1)
        environ = to_environ(self._control) | {
            "ORCH_LISTEN": listen,
            "ORCH_AUTH_TOKEN": token,
            "DATABASE_URL": f"sqlite://{self.places.control / 'fuse.db'}",
            "FIRECRACKER_BASE_URL": host_url,
            "FIRECRACKER_TOKEN": (self.places.host / "token").read_text().strip(),
        }
        user = [] if uid is None else ["--user", str(uid)]
        return Program(
            name="control plane",
            # The file for its agent profiles; everything else is in the variables, which win.
            command=fuse_command(
                "serve", "--config", str(self._control.file or os.devnull), "--ready-file", str(ready_file), *user
            ),
            environ=environ,
            log=self.places.logs / "control.log",
            is_ready=ready_file.exists,
            umask=0o077,
        )

    def _read_host(self) -> HostFile:
        try:
            return msgspec.json.decode((self.places.host / "host.json").read_bytes(), type=HostFile)
        except (OSError, msgspec.DecodeError) as error:
            raise CliError(f"the host daemon says nothing useful about itself: {error}") from error

    def _wait_for_host(self) -> None:
        """Until the control plane has seen its host, creates would be refused."""
        ends_at = time.monotonic() + HOST_HEALTHY_S
        with self.client() as fuse:
            while not any(host.health == "ok" for host in fuse.hosts.list()):
                if time.monotonic() > ends_at:
                    raise StartFailed(
                        "the control plane does not reach the host daemon",
                        hint=f"see {self.places.logs / 'control.log'}",
                        code=UNAVAILABLE,
                    )
                self.check()
                time.sleep(0.1)

    def _save_record(self) -> None:
        supervisor = identify(os.getpid())
        assert supervisor is not None  # noqa: S101 - we are running
        children = [child.identity for child in self._stack.children if child.identity is not None]
        context = self._running.context if self._running is not None else None
        save_private(self.places.record, UpRecord(supervisor=supervisor, children=children, context=context))


class Before:
    """What of an installation was there before a start; the rest is what the start has made."""

    def __init__(self, places: Places) -> None:
        self._folders = [folder for folder in (places.host, places.control, places.logs) if not folder.exists()]
        files = (places.token, places.settings, places.record, places.lock)
        self._files = [file for file in files if not file.exists()]
        self._ways = [folder for folder in (places.data, *places.data.parents) if not folder.exists()]

    def is_new(self, folder: Path) -> bool:
        """Was one of the installation's folders missing?"""
        return folder in self._folders

    def restore(self) -> None:
        """Remove what was not there. The data folder stays when something else has come into it."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        for file in self._files:
            file.unlink(missing_ok=True)
        for folder in self._ways:
            with contextlib.suppress(OSError):
                folder.rmdir()


def local_client(context: Context) -> Fuse:
    """A client of a stack of this machine. Proxies play no role."""
    return Fuse(
        context.url,
        context.token,
        ca_file=context.ca_file or None,
        pin_certificate=context.pin_certificate,
        environ={},
    )


def fuse_command(*arguments: str) -> list[str]:
    """The command line of our own program, in this interpreter."""
    return [sys.executable, "-m", "fusevm", *arguments]


def make_folders(places: Places) -> None:
    """The folders, private where they hold secrets. The control plane's user must get through the outermost one."""
    places.data.mkdir(mode=0o755, parents=True, exist_ok=True)
    for folder in (places.host, places.control, places.logs):
        folder.mkdir(mode=0o700, exist_ok=True)


def take_lock(places: Places) -> IO[str]:
    """Be the only one. Raises DataRootInUse with the pid of the other."""
    lock = places.lock.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        record = load_record(places)
        lock.close()
        raise DataRootInUse(path=str(places.data), pid=str(record.supervisor.pid) if record else "unknown") from error
    return lock


def load_record(places: Places) -> UpRecord | None:
    """What `up.json` says, or None."""
    try:
        return msgspec.json.decode(places.record.read_bytes(), type=UpRecord)
    except (OSError, msgspec.DecodeError):
        return None


def save_settings(places: Places, host: Loaded) -> None:
    """Remember how the host daemon runs, for a `fuse down` that has to start it again."""
    given = {setting.name: to_text(host[setting.name]) for setting in host.table if host.is_given(setting.name)}
    places.settings.write_bytes(msgspec.json.encode(given))


def load_settings(places: Places) -> dict[str, str | bool | None]:
    """How the host daemon ran last, as flags."""
    try:
        return msgspec.json.decode(places.settings.read_bytes(), type=dict[str, str | bool | None])
    except (OSError, msgspec.DecodeError):
        return {}


def find_predecessor(places: Places) -> list[Identity]:
    """The daemons of a `fuse up` that was killed, which may still be ending."""
    record = load_record(places)
    return [child for child in record.children if is_running(child)] if record else []


def end_predecessor(places: Places, say: Callable[[str], None]) -> None:
    """Wait for the daemons of a `fuse up` that was killed; they end by themselves, or are ended."""
    left = find_predecessor(places)
    if not left:
        return
    say("the daemons of an earlier `fuse up` are still ending ...")
    for child in left:
        if not end(child, signal.SIGTERM, _PREDECESSOR_S):
            end(child, signal.SIGKILL, 5.0)


def read_or_make_token(path: Path, given: str) -> str:
    """The master token: the one given, else the installation's own, made once (0600)."""
    if given:
        return given
    with contextlib.suppress(FileNotFoundError):
        token = path.read_text().strip()
        if token:
            return token
    token = secrets.token_urlsafe(32)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(token + "\n")
    return token


def to_environ(loaded: Loaded) -> dict[str, str]:
    """The values that were given, as variables for a child; secrets thus never show in the process list.

    Empty means unset, whatever our own environment says.
    """
    table = loaded.table
    return {one.env: to_text(loaded[one.name]) if loaded.is_given(one.name) else "" for one in table}


def to_text(value: object) -> str:
    """A setting's value as one would write it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def control_uid() -> int | None:
    """As whom the control plane runs when we are root: `fuse` if there is such a user, else a number of its own just
    below those of the machines. None: as we are."""
    if os.geteuid() != 0:
        return None
    import pwd  # noqa: PLC0415 - only as root

    from fusevm.host.config import HostConfig  # noqa: PLC0415 - as above

    with contextlib.suppress(KeyError):
        return pwd.getpwnam("fuse").pw_uid
    return HostConfig(data_root=Path("/")).uid_base - 1
