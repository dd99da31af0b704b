"""What is there and what is wanted become steps. Pure: nothing is looked at or changed here.

A plan holds only what is missing, so that the plan of a finished installation is empty, and one that was killed
anywhere goes on where it was. Steps stand in the order in which each needs those before it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from fusevm.cli.install.env_file import parse_env, render_env
from fusevm.cli.install.steps import (
    AwaitControl,
    AwaitHost,
    BuildImage,
    Enable,
    EndMachines,
    FetchKernel,
    GetFile,
    InstallPackages,
    LinkProgram,
    MakeToken,
    ReloadSystemd,
    RemovePath,
    Start,
    Step,
    Stop,
    StoreKernel,
    SweepBuilds,
    UnpackRelease,
    WriteFile,
)
from fusevm.host.vmm.firecracker.pins import KERNELS, RELEASES, VERSION_TEXT, Pin, release_folder

HOST_UNIT: Final = "fuse-host.service"
CONTROL_UNIT: Final = "fuse-control.service"
UNITS: Final = (HOST_UNIT, CONTROL_UNIT)
_KERNEL_PACKAGE: Final = re.compile(r"linux-(image|modules)-.*\.deb")


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where an installation puts what. The units name the same places."""

    link: Path = Path("/usr/local/bin/fuse")
    units: Path = Path("/etc/systemd/system")
    settings: Path = Path("/etc/fuse")
    #: Images, kernels, programs.
    data: Path = Path("/var/lib/fuse")
    #: Journal, disks and keys of the host daemon.
    data_root: Path = Path("/var/lib/fuse/host")
    control_data: Path = Path("/var/lib/private/fuse-control")
    run: Path = Path("/run/fuse")
    #: What `deploy/install.sh` puts programs into, one folder each.
    programs: Path = Path("/opt/fuse")
    #: Folders that the administrator has chosen: others may use them, they are not removed.
    chosen: frozenset[Path] = frozenset()

    @property
    def host_env(self) -> Path:
        return self.settings / "host.env"

    @property
    def control_env(self) -> Path:
        return self.settings / "control.env"

    @property
    def socket(self) -> Path:
        return self.data_root / "firecracker-host.sock"

    @property
    def downloads(self) -> Path:
        return self.data / "downloads"

    @property
    def packages(self) -> Path:
        """Names of the packages that an installation has added."""
        return self.settings / "packages"

    @property
    def previous(self) -> Path:
        """Names the program that served last, until the next one does."""
        return self.settings / "previous"

    @property
    def tls_drop_in(self) -> Path:
        return self.units / f"{CONTROL_UNIT}.d" / "tls.conf"


class UnitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One service, as it is."""

    #: Unit file; empty: none.
    text: str = ""
    #: Drop-in of ours; empty: none.
    drop_in: str = ""
    #: What systemd has read is older than the files.
    needs_reload: bool = False
    is_enabled: bool = False
    is_active: bool = False
    #: Started before the last change of its unit, settings or program.
    is_stale: bool = False
    #: It answers.
    is_serving: bool = False


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is there."""

    architecture: str
    missing_packages: tuple[str, ...] = ()
    #: Names of files that were brought here (`--from`).
    local: frozenset[str] = frozenset()
    has_release: bool = False
    has_firecracker_kernel: bool = False
    has_kernel: bool = False
    has_image: bool = False
    has_token: bool = False
    has_downloads: bool = False
    #: Stores with working folders of killed builds.
    littered: tuple[Path, ...] = ()
    link_target: Path | None = None
    #: The program that is put back when the one that is linked does not serve.
    previous: Path | None = None
    host_env: str = ""
    control_env: str = ""
    packages: str = ""
    units: Mapping[str, UnitFacts] = {}
    #: Folders of programs that `deploy/install.sh` has made, below `Places.programs`.
    programs: tuple[Path, ...] = ()
    #: What of the places above exists, if only as what a killed run has left beside it; the folder of programs only
    #: when nothing else is in it.
    existing: frozenset[Path] = frozenset()


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a host shall be."""

    #: The `fuse` that the services run.
    program: Path
    #: Text of each unit.
    units: Mapping[str, str]
    #: For `host.env`.
    settings: Mapping[str, str] = {}
    #: `auto` or `firecracker` needs Firecracker.
    has_firecracker: bool = True
    #: Image to build; empty: none.
    image: str = ""
    #: Folder with files that were brought here.
    source: Path | None = None
    #: Where files are by their names, instead of at their origin.
    mirror: str = ""
    #: File name -> digest, instead of the pinned one.
    digests: Mapping[str, str] = {}


def plan_host(wanted: Wanted, facts: Facts, places: Places) -> list[Step]:
    """Everything that makes a bare machine a serving host."""
    return [
        *plan_parts(wanted, facts, places),
        *plan_service(wanted, facts, places),
        *plan_start(wanted, facts, places),
    ]


def plan_parts(wanted: Wanted, facts: Facts, places: Places) -> list[Step]:
    """Packages, programs, kernels, image."""
    steps: list[Step] = []
    if facts.missing_packages:
        # Written first: what is removed later must be known, whatever happens in between.
        names = sorted({*facts.packages.split(), *facts.missing_packages})
        steps += [
            WriteFile(path=places.packages, text="".join(f"{name}\n" for name in names)),
            InstallPackages(names=facts.missing_packages),
        ]
    if wanted.has_firecracker:
        steps += _plan_firecracker(wanted, facts, places)
    if facts.architecture == "x86_64" and not facts.has_kernel:
        packages = tuple(_local(wanted, name) for name in sorted(facts.local) if _KERNEL_PACKAGE.fullmatch(name))
        steps.append(FetchKernel(data=places.data, packages=packages))
    if wanted.image and not facts.has_image:
        tars = sorted(name for name in facts.local if name.startswith(f"{wanted.image}.tar"))
        source = _local(wanted, tars[0]) if tars else None
        steps.append(BuildImage(name=wanted.image, data=places.data, source=source))
    if facts.has_downloads or any(isinstance(step, GetFile) for step in steps):
        steps.append(RemovePath(path=places.downloads))
    # A build that is still to be done sweeps its own store; a killed one may have been whole but for that.
    return [*steps, *(SweepBuilds(root=root) for root in facts.littered)]


def _plan_firecracker(wanted: Wanted, facts: Facts, places: Places) -> list[Step]:
    steps: list[Step] = []
    if not facts.has_release:
        get = _get(wanted, facts, places, RELEASES[facts.architecture])
        folder = release_folder(places.data)
        unpack = UnpackRelease(archive=get.target, sha256=get.pin.sha256, folder=folder, version=VERSION_TEXT)
        steps += [get, unpack]
    if not facts.has_firecracker_kernel:
        get = _get(wanted, facts, places, KERNELS[facts.architecture])
        steps += [get, StoreKernel(file=get.target, data=places.data)]
    return steps


def _get(wanted: Wanted, facts: Facts, places: Places, pin: Pin) -> GetFile:
    chosen = expected(wanted.digests, pin)
    if wanted.mirror:
        chosen = Pin(url=f"{wanted.mirror.rstrip('/')}/{pin.name}", sha256=chosen.sha256)
    source = _local(wanted, pin.name) if pin.name in facts.local else None
    return GetFile(pin=chosen, target=places.downloads / pin.name, source=source)


def expected(digests: Mapping[str, str], pin: Pin) -> Pin:
    """A pin with the digest that an administrator has named for its file, or its own."""
    return Pin(url=pin.url, sha256=digests.get(pin.name, pin.sha256))


def _local(wanted: Wanted, name: str) -> Path:
    assert wanted.source is not None  # noqa: S101 - there are local files only in a folder
    return wanted.source / name


def plan_service(wanted: Wanted, facts: Facts, places: Places) -> list[Step]:
    """Token, program, settings and unit of the host daemon."""
    steps: list[Step] = [] if facts.has_token else [MakeToken(data_root=places.data_root)]
    values = dict(wanted.settings)
    if wanted.has_firecracker:
        folder = release_folder(places.data)
        values |= {
            "FIRECRACKER_BINARY_PATH": str(folder / "firecracker"),
            "JAILER_BINARY_PATH": str(folder / "jailer"),
        }
    if _needs_previous(wanted, facts):
        assert facts.link_target is not None  # noqa: S101 - as above
        steps.append(LinkProgram(link=places.previous, target=facts.link_target))
    steps += _plan_unit(HOST_UNIT, wanted, facts, places)
    if (text := render_env(facts.host_env, values)) != facts.host_env:
        steps.append(WriteFile(path=places.host_env, text=text, mode=0o600))
    return [*steps, *_plan_enabling(HOST_UNIT, steps, facts)]


def _needs_previous(wanted: Wanted, facts: Facts) -> bool:
    """Is a program that served about to be replaced? One that was noted and never replaced by one that serves stays."""
    return facts.link_target not in (None, wanted.program) and facts.previous is None


def _plan_unit(unit: str, wanted: Wanted, facts: Facts, places: Places) -> list[Step]:
    steps: list[Step] = []
    if facts.link_target != wanted.program:
        steps.append(LinkProgram(link=places.link, target=wanted.program))
    if facts.units[unit].text != wanted.units[unit]:
        steps.append(WriteFile(path=places.units / unit, text=wanted.units[unit]))
    return steps


def _plan_enabling(unit: str, before: Sequence[Step], facts: Facts) -> list[Step]:
    """Reload and enable, where the steps before or an earlier, killed run made it necessary."""
    is_written = any(isinstance(step, WriteFile) and unit in str(step.path) for step in before)
    steps: list[Step] = [ReloadSystemd()] if is_written or facts.units[unit].needs_reload else []
    if not facts.units[unit].is_enabled:
        steps.append(Enable(unit=unit))
    return steps


def plan_start(wanted: Wanted, facts: Facts, places: Places) -> list[Step]:
    """Run the host daemon as it is installed. What runs as it should is left alone."""
    unit = facts.units[HOST_UNIT]
    will_change = any(isinstance(step, WriteFile | LinkProgram) for step in plan_service(wanted, facts, places))
    steps: list[Step] = [Start(unit=HOST_UNIT)] if will_change or unit.is_stale or not unit.is_active else []
    if steps or not unit.is_serving:
        steps.append(AwaitHost(socket=places.socket))
    if facts.previous is not None or _needs_previous(wanted, facts):
        steps.append(RemovePath(path=places.previous))
    return steps


def plan_upgrade(wanted: Wanted, facts: Facts, places: Places) -> list[Step]:
    """The services run this program from now on. Machines run on meanwhile; old programs go at the end."""
    steps = plan_host(wanted, facts, places)
    control = facts.units[CONTROL_UNIT]
    if control.text:
        own = [step for step in _plan_unit(CONTROL_UNIT, wanted, facts, places) if not isinstance(step, LinkProgram)]
        steps += [*own, *_plan_enabling(CONTROL_UNIT, own, facts)]
        is_other = bool(own) or facts.link_target != wanted.program
        url = control_url(parse_env(facts.control_env), has_tls=bool(control.drop_in))
        steps += _plan_control_start(control, url, will_change=is_other)
    old = [path for path in facts.programs if path not in wanted.program.parents]
    return [*steps, *(RemovePath(path=path) for path in old)]


class ControlWanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the co-located control plane shall be."""

    #: For `control.env`; the secrets among them are used only where it has none.
    settings: Mapping[str, str]
    fresh: Mapping[str, str]
    #: Certificate chain and key that it serves with; None: plain HTTP.
    tls: tuple[Path, Path] | None = None


def plan_control(host: Wanted, wanted: ControlWanted, facts: Facts, places: Places) -> list[Step]:
    """Settings, unit and start of the control plane beside a host daemon that serves."""
    own = _plan_unit(CONTROL_UNIT, host, facts, places)
    text = render_control_env(facts.control_env, wanted)
    if text != facts.control_env:
        own.append(WriteFile(path=places.control_env, text=text, mode=0o600))
    drop_in = facts.units[CONTROL_UNIT].drop_in
    if wanted.tls is not None and render_tls(*wanted.tls) != drop_in:
        drop_in = render_tls(*wanted.tls)
        own.append(WriteFile(path=places.tls_drop_in, text=drop_in))
    steps = [*own, *_plan_enabling(CONTROL_UNIT, own, facts)]
    unit = facts.units[CONTROL_UNIT]
    url = control_url(parse_env(text), has_tls=bool(drop_in))
    return [*steps, *_plan_control_start(unit, url, will_change=bool(own))]


def _plan_control_start(unit: UnitFacts, url: str, *, will_change: bool) -> list[Step]:
    steps: list[Step] = [Start(unit=CONTROL_UNIT)] if will_change or unit.is_stale or not unit.is_active else []
    return [*steps, AwaitControl(url=url)] if steps or not unit.is_serving else []


def render_control_env(text: str, wanted: ControlWanted) -> str:
    """The settings file: what is given, and of the fresh secrets only those that it lacks."""
    there = parse_env(text)
    lacking = {name: value for name, value in wanted.fresh.items() if not there.get(name)}
    return render_env(text, lacking | dict(wanted.settings))


def render_tls(cert: Path, key: Path) -> str:
    """A drop-in that hands certificate and key to the service's own user (systemd.exec(5), LoadCredential=).

    systemd reads the files as root when the service starts, so they may stay as closed as they are.
    """
    return (
        "[Service]\n"
        f"LoadCredential=tls.crt:{cert}\n"
        f"LoadCredential=tls.key:{key}\n"
        "Environment=ORCH_TLS_CERT=%d/tls.crt ORCH_TLS_KEY=%d/tls.key\n"
    )


def control_url(settings: Mapping[str, str], *, has_tls: bool = False, name: str = "") -> str:
    """Where clients of this machine reach the control plane; `name`: what its certificate is for."""
    host, _, port = settings.get("ORCH_LISTEN", "127.0.0.1:8080").rpartition(":")
    if host in ("", "0.0.0.0"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    return f"{'https' if has_tls else 'http'}://{name or ('[::1]' if host == '[::]' else host)}:{port}"


def plan_uninstall(facts: Facts, places: Places, *, keeps_data: bool) -> list[Step]:
    """Remove everything, but for data, settings and keys when those are kept. The program itself goes last."""
    steps: list[Step] = []
    for unit in reversed(UNITS):
        there = facts.units[unit]
        if there.text or there.is_active or there.is_enabled:
            steps.append(Stop(unit=unit))
    if any(path in facts.existing for path in (places.run, places.data_root)) or steps:
        steps.append(EndMachines())
    doomed = [*(places.units / unit for unit in UNITS), places.tls_drop_in.parent, places.run]
    is_loaded = any(path in facts.existing for path in doomed[:3])
    is_loaded |= any(unit.needs_reload for unit in facts.units.values())
    if keeps_data:
        doomed += [places.downloads, places.previous]
    else:
        doomed += [places.control_data, places.control_data.parent.parent / "fuse-control"]
        doomed += [places.data_root, places.data, places.settings]
    steps += [RemovePath(path=path) for path in doomed if path in facts.existing and not _is_chosen(path, places)]
    if is_loaded:
        steps.append(ReloadSystemd())
    if places.link in facts.existing:
        steps.append(RemovePath(path=places.link))
    doomed = [places.programs] if places.programs in facts.existing else [*facts.programs]
    return [*steps, *(RemovePath(path=path) for path in doomed)]


def _is_chosen(path: Path, places: Places) -> bool:
    """Is a folder the administrator's, or is one of theirs in it?"""
    return any(one == path or path in one.parents for one in places.chosen)
