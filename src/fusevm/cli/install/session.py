"""One run of an installation: what was asked for, what is there, the plan of it, and its steps one after the other.

Two runs at a time are kept apart by a lock. Facts are gathered again before anything is done.
"""

import asyncio
import contextlib
import datetime as dt
import os
import secrets
import socket
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from cryptography import x509

from fusevm.cli import settings
from fusevm.cli.failures import USAGE, CliError
from fusevm.cli.host_settings import host_config
from fusevm.cli.install.env_file import parse_env
from fusevm.cli.install.observe import check_machine, find_program, observe, read_units
from fusevm.cli.install.perform import Performer, point_link
from fusevm.cli.install.plan import (
    HOST_UNIT,
    ControlWanted,
    Facts,
    Places,
    Wanted,
    control_url,
    plan_control,
    plan_uninstall,
)
from fusevm.cli.install.services import Services
from fusevm.cli.install.steps import AwaitHost, Step
from fusevm.cli.install.traces import remove
from fusevm.cli.installation import HostFile, to_text
from fusevm.cli.output import say
from fusevm.cli.progress import Meter
from fusevm.cli.teardown import has_machines
from fusevm.control.tls import check_pair
from fusevm.host.config import HostConfig, parse_listen
from fusevm.host.name_lock import name_lock
from fusevm.host.vmm.firecracker.pins import KERNELS, RELEASES
from fusevm.model.errors import BadSetting

DEFAULT_DATABASE: Final = "sqlite:///var/lib/fuse-control/fuse.db"
#: Where the control plane's user may write.
_CONTROL_FOLDER: Final = "/var/lib/fuse-control/"
_LOCK: Final = Path("/run/fuse-install.lock")
Planner = Callable[[Wanted, Facts, Places], Sequence[Step]]


class HostRun(msgspec.Struct, frozen=True, kw_only=True):
    """Installing, starting or upgrading the host daemon."""

    wanted: Wanted
    places: Places
    config: HostConfig

    def plan(self, planner: Planner) -> Sequence[Step]:
        """What is to be done."""
        return planner(self.wanted, asyncio.run(observe(self.wanted, self.places)), self.places)

    def carry_out(self, planner: Planner, performers: type[Performer] = Performer) -> None:
        """Do it. A new program that does not serve is taken back."""
        with _alone():
            asyncio.run(self._carry_out(planner, performers))

    async def _carry_out(self, planner: Planner, performers: type[Performer]) -> None:
        steps = planner(self.wanted, await observe(self.wanted, self.places), self.places)
        with Meter() as meter:
            performer = performers(self.config, say, meter)
            for step in steps:
                try:
                    await performer.perform(step)
                except CliError:
                    if isinstance(step, AwaitHost) and self.places.previous.exists():
                        await self._take_back(self.places.previous.readlink())
                    raise

    async def _take_back(self, previous: Path) -> None:
        say(f"the new program does not serve: {previous} is put back")
        point_link(self.places.link, previous)
        await Services().restart(HOST_UNIT)
        await Services().wait_for_host(self.places.socket)
        remove(self.places.previous)

    def connection(self) -> tuple[str, str]:
        """Address and token for a control plane."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            state = msgspec.json.decode((self.places.data_root / "host.json").read_bytes(), type=HostFile)
            if state.url:
                return reachable(state.url), self._token()
        listen = parse_listen(self.config.listen)
        if listen is None:
            return f"unix://{self.config.api_socket}", self._token()
        scheme = "http" if self.config.plain_http else "https"
        return reachable(f"{scheme}://{listen.host}:{listen.port}"), self._token()

    def _token(self) -> str:
        return (self.places.data_root / "token").read_text().strip()


def open_host(given: dict[str, Any]) -> HostRun:
    """Read what was asked for. Settings that were given before, and are not now, stay. Raises CliError, BadSetting."""
    check_machine()
    source, mirror, digests, image = (given.pop(name) for name in ("source", "mirror", "digests", "image"))
    known = parse_env(_read(Places().host_env))
    said = {one.env: os.environ[one.env] for one in settings.HOST if os.environ.get(one.env)}
    loaded = settings.load("host", given, {**known, **said})
    with loaded.naming_sources():
        config = host_config(loaded, {}, str(Places().data))
        config.check()
    values = {
        one.env: to_text(loaded[one.name]) for one in loaded.table if given.get(one.name) is not None or one.env in said
    }
    if mirror and urllib.parse.urlsplit(mirror).scheme not in ("http", "https"):
        raise BadSetting(setting="--mirror", problem=f"{mirror!r} is no http(s) address")
    wanted = Wanted(
        program=find_program(),
        units=read_units(),
        settings=values,
        has_firecracker=loaded["driver"] != "qemu",
        image=image,
        source=source,
        mirror=mirror,
        digests=parse_digests(digests),
    )
    places = msgspec.structs.replace(
        Places(),
        data=config.artefacts,
        data_root=config.data_root,
        run=config.runtime_directory,
        chosen=frozenset({config.artefacts, config.data_root} - {Places().data, Places().data_root}),
    )
    return HostRun(wanted=wanted, places=places, config=config)


def parse_digests(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=DIGEST pairs for files that are pinned. Raises a usage error."""
    known = [pin.name for table in (RELEASES, KERNELS) for pin in table.values()]
    found = {}
    for pair in pairs:
        name, _, digest = pair.partition("=")
        if name not in known or len(digest) != 64 or not all(letter in "0123456789abcdef" for letter in digest):
            raise click.UsageError(f"--sha256 takes NAME=DIGEST, 64 hex digits, for one of {', '.join(known)}")
        found[name] = digest
    return found


def reachable(url: str) -> str:
    """An address of every interface, as one that can be connected to from elsewhere."""
    parts = urllib.parse.urlsplit(url)
    if parts.hostname not in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        return url
    return f"{parts.scheme}://{_own_address()}:{parts.port}"


def _own_address() -> str:
    """The address that this machine's default route sends from; loopback without one. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


class ControlRun:
    """Installing the control plane beside this machine's host daemon."""

    def __init__(self, host: HostRun, listen: str | None, tls: tuple[Path, Path] | None) -> None:
        self._host = host
        self._tls = tls
        self._known = parse_env(_read(host.places.control_env))
        self._values = {"ORCH_REQUIRE_AUTH": "true"}
        if listen is not None:
            self._values["ORCH_LISTEN"] = settings.load("control", {"listen": listen}, {})["listen"]
        elif not self._known.get("ORCH_LISTEN"):
            self._values["ORCH_LISTEN"] = "127.0.0.1:8080"

    def known_database(self) -> str:
        """What an earlier run has written; empty: nothing."""
        return self._known.get("DATABASE_URL", "")

    def choose_database(self, url: str) -> None:
        """Use this one. Raises BadSetting for one that its user could not write to."""
        settings.load("control", {"database_url": url}, {})
        path = url.removeprefix("sqlite://") if "://" in url else url
        is_file = "://" not in url or url.startswith("sqlite:")
        if is_file and (not path.startswith(_CONTROL_FOLDER) or ".." in Path(path).parts):
            problem = f"the service may write below {_CONTROL_FOLDER} only; {DEFAULT_DATABASE} is there"
            raise BadSetting(setting="DATABASE_URL", problem=problem)
        self._values["DATABASE_URL"] = url

    def plan(self) -> Sequence[Step]:
        """What is to be done."""
        return asyncio.run(self._plan())

    async def _plan(self) -> Sequence[Step]:
        host = self._host
        facts = await observe(host.wanted, host.places)
        base_url, token = host.connection()
        values = {**self._values, "FIRECRACKER_BASE_URL": base_url, "FIRECRACKER_TOKEN": token}
        fresh = {"ORCH_AUTH_TOKEN": secrets.token_urlsafe(32), "TOKEN_ENCRYPTION_KEY": secrets.token_hex(32)}
        wanted = ControlWanted(settings=values, fresh=fresh, tls=self._tls)
        return plan_control(host.wanted, wanted, facts, host.places)

    def carry_out(self, performers: type[Performer] = Performer) -> None:
        """Do it."""
        with _alone():
            asyncio.run(_perform(self._host.config, self._plan, performers))

    def connection(self) -> tuple[str, str]:
        """Address and master token for clients."""
        places = self._host.places
        known = parse_env(_read(places.control_env))
        cert = self._tls[0] if self._tls else _installed_certificate(places)
        name = certificate_name(cert) if cert else ""
        return control_url(known, has_tls=cert is not None, name=name), known["ORCH_AUTH_TOKEN"]


def open_control(*, listen: str | None, tls: tuple[Path, Path] | None) -> ControlRun:
    """Check what is needed: a host daemon that was installed, a pair that can be served with."""
    check_machine()
    host = open_host({"source": None, "mirror": "", "digests": (), "image": ""})
    if not (host.places.data_root / "token").is_file():
        raise CliError("there is no host daemon here", hint="`fuse host install` first", code=USAGE)
    if tls is not None:
        check_pair(str(tls[0]), str(tls[1]), dt.datetime.now(dt.UTC))
    return ControlRun(host, listen, tls)


def _installed_certificate(places: Places) -> Path | None:
    for line in _read(places.tls_drop_in).splitlines():
        if line.startswith("LoadCredential=tls.crt:"):
            return Path(line.partition(":")[2])
    return None


def certificate_name(path: Path) -> str:
    """The first host name that a certificate is for; empty when it names none."""
    certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    plain = [name for name in names.get_values_for_type(x509.DNSName) if not name.startswith("*")]
    return plain[0] if plain else ""


class Removal:
    """Removing everything of this machine."""

    def __init__(self, host: HostRun, *, keeps_data: bool) -> None:
        self._host = host
        self._keeps_data = keeps_data

    def plan(self) -> Sequence[Step]:
        """What is to be done."""
        return asyncio.run(self._plan())

    async def _plan(self) -> Sequence[Step]:
        facts = await observe(self._host.wanted, self._host.places)
        return plan_uninstall(facts, self._host.places, keeps_data=self._keeps_data)

    def carry_out(self, performers: type[Performer] = Performer, *, is_forced: bool) -> None:
        """Do it. Raises CliError while there are machines, unless forced."""
        if has_machines(self._host.config) and not is_forced:
            hint = "`fuse env list` and `fuse env rm` first; --force ends them"
            raise CliError(f"there are machines below {self._host.places.data_root}", hint=hint, code=USAGE)
        with _alone():
            self._say_what_stays()  # before the settings are gone, which a run after a killed one cannot read any more
            asyncio.run(_perform(self._host.config, self._plan, performers))

    def _say_what_stays(self) -> None:
        places = self._host.places
        packages = _read(places.packages).split()
        left = [str(path) for path in sorted(places.chosen) if path.exists()]
        if left and not self._keeps_data:
            say(f"you chose these folders, so they stay: {' '.join(left)}")
        if packages:
            say(f"these packages were installed for Fuse, and stay: {' '.join(packages)}")


def open_removal(*, keeps_data: bool) -> Removal:
    """Everything of the installation that the settings file tells of."""
    return Removal(open_host({"source": None, "mirror": "", "digests": (), "image": ""}), keeps_data=keeps_data)


async def _perform(config: HostConfig, plan: Callable[[], Any], performers: type[Performer]) -> None:
    with Meter() as meter:
        performer = performers(config, say, meter)
        for step in await plan():
            await performer.perform(step)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Be the only one that installs, until the end of this process at the latest. Raises CliError."""
    with name_lock(_LOCK) as is_ours:
        if not is_ours:
            problem = "another `fuse host` command is changing this machine"
            raise CliError(problem, hint="repeat it when that has ended")
        yield


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
