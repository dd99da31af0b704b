"""Settings of the host daemon: one frozen record, checked before anything is touched.

Owns: defaults, bounds, and what the settings mean together. Must not: read variables or files (the `fuse` command and
`python -m fusevm.host` do) nor look at the machine it runs on, except for the defaults that depend on the user.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal

import msgspec

from fusevm.host.contract.keys import parse_keys
from fusevm.host.images.addresses import parse_networks
from fusevm.model.errors import BadField, BadSetting, PathTooLong

#: sun_path of unix(7) without its NUL.
SOCKET_PATH_LIMIT = 107
#: Longest machine id (`model.ids.MACHINE_ID`) and longest socket name below a machine's run directory.
_LONGEST_SOCKET = f"/{'m' * 63}/agent.sock"
DEFAULT_LISTEN = "127.0.0.1:8090"
SOCKET_NAME = "firecracker-host.sock"


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """Where the daemon listens on TCP."""

    host: str
    #: 0: any free port.
    port: int

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class HostConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an administrator chooses. `check` says what is wrong with it."""

    #: Journal, disks, images, keys. One daemon per directory.
    data_root: Path
    #: Sockets and logs of running machines; short, because Unix socket paths are. None: chosen by `resolve_run_dir`.
    run_dir: Path | None = None
    #: Images, kernels, initramfs and blank disks; None: below `data_root`.
    artefact_root: Path | None = None
    #: host:port of the TCP listener; empty: none.
    listen: str = DEFAULT_LISTEN
    #: Plain HTTP instead of TLS. Loopback only.
    plain_http: bool = False
    #: Unix socket of the API; None: `<data_root>/firecracker-host.sock`.
    socket_path: Path | None = None
    driver: Literal["auto", "firecracker", "qemu"] = "auto"
    #: Programs; None: those of `fuse host install`, else those on the path.
    firecracker_binary: Path | None = None
    jailer_binary: Path | None = None
    #: Kernel file (bzImage or ELF); None: for Firecracker the one that was installed with it, else Debian's cloud
    #: kernel, fetched once.
    kernel: Path | None = None
    #: IPv4 network that the machines' slots take their outside addresses from.
    network_range: str = "10.210.0.0/16"
    #: Bytes.
    network_mtu: int = 1500
    #: Interface that leads to the Internet; empty: that of the default route.
    egress_interface: str = ""
    #: Ports of the host that machines may publish: first and last.
    published_ports: str = "20000-39999"
    #: Slots kept ready.
    warm_slots: int = 4
    #: First uid and gid of VMM processes, and how many.
    uid_base: int = 200_000
    uid_count: int = 65_536
    #: Without root: let machines reach the Internet through QEMU's user network, with the daemon's own rights.
    user_network: bool = False
    #: Bytes of console output kept per machine.
    console_bytes: int = 4 << 20
    #: What each disk of a machine may do per second, on average; 0: no limit.
    disk_bytes_per_s: int = 0
    disk_ops_per_s: int = 0
    #: Machines at the same time, stopped ones included.
    max_machines: int = 1000
    #: Virtual CPUs given out per CPU of the host.
    cpu_ratio: float = 4.0
    #: Memory kept for the host itself.
    ram_reserve_mib: int = 512
    #: CPUs kept for the host itself.
    cpu_reserve: int = 0
    #: Creates are refused when less than this is free below `data_root`.
    disk_reserve_bytes: int = 2 << 30
    #: Sum of the machines' disk sizes per byte of the file system (disks are sparse).
    disk_ratio: float = 4.0
    #: Largest root file system that is pulled, imported or unpacked, apparent size.
    image_max_bytes: int = 16 << 30
    #: Networks in CIDR form that an artifact's URL may lead to although they are not public.
    artifact_networks: tuple[str, ...] = ()
    #: Percent of the file system in use: above the first, images that can be had again go, until it is the second.
    image_high_percent: int = 85
    image_low_percent: int = 75
    #: Starts the name of every kernel object of this daemon; two daemons on one host need two.
    instance: str = "fuse"
    #: Seconds between two sweeps for leftovers.
    sweep_interval_s: float = 60.0
    #: Public key of the SSH authority whose users every machine of the contract lets in, before those of its create.
    login_ca: str = ""
    #: Tests only: the journal point at which the process kills itself.
    fault: str = ""

    @property
    def artefacts(self) -> Path:
        return self.artefact_root or self.data_root

    @property
    def api_socket(self) -> Path:
        return self.socket_path or self.data_root / SOCKET_NAME

    @property
    def runtime_directory(self) -> Path:
        return self.run_dir or default_run_dir(self.instance)

    def check(self) -> None:
        """Raise BadSetting or PathTooLong for the first setting that cannot work."""
        listen = parse_listen(self.listen)
        if self.plain_http and listen is not None and not listen.is_loopback:
            raise BadSetting(setting="plain_http", problem=f"{self.listen} is not loopback; leave TLS on")
        if not self.data_root.is_absolute():
            raise BadSetting(setting="data_root", problem=f"{str(self.data_root)!r} is not an absolute path")
        for path, longest in ((self.api_socket, ""), (self.runtime_directory, _LONGEST_SOCKET)):
            if len(os.fsencode(path)) + len(longest) > SOCKET_PATH_LIMIT:
                raise PathTooLong(path=str(path), limit=SOCKET_PATH_LIMIT - len(longest))
        parse_networks(self.artifact_networks)
        parse_port_range(self.published_ports)
        self._check_login_ca()
        self._check_numbers()

    def _check_login_ca(self) -> None:
        if self.login_ca:
            try:
                parse_keys([self.login_ca], "login_ca")
            except BadField as e:
                raise BadSetting(setting="login_ca", problem=e.problem) from e

    def _check_numbers(self) -> None:
        bounds: tuple[tuple[str, float, float], ...] = (
            ("console_bytes", self.console_bytes, 64 << 10),
            ("disk_bytes_per_s", self.disk_bytes_per_s, 0),
            ("disk_ops_per_s", self.disk_ops_per_s, 0),
            ("max_machines", self.max_machines, 1),
            ("cpu_ratio", self.cpu_ratio, 0.1),
            ("disk_ratio", self.disk_ratio, 0.1),
            ("ram_reserve_mib", self.ram_reserve_mib, 0),
            ("cpu_reserve", self.cpu_reserve, 0),
            ("disk_reserve_bytes", self.disk_reserve_bytes, 0),
            ("warm_slots", self.warm_slots, 0),
            # Below are users of the distribution and of people.
            ("uid_base", self.uid_base, 65_536),
            ("uid_count", self.uid_count, 1),
            ("sweep_interval_s", self.sweep_interval_s, 0.1),
            ("image_max_bytes", self.image_max_bytes, 1 << 20),
            ("image_low_percent", self.image_low_percent, 1),
            ("image_high_percent", self.image_high_percent, self.image_low_percent),
        )
        for setting, value, least in bounds:
            if value < least:
                raise BadSetting(setting=setting, problem=f"{value} is less than {least}")


def parse_listen(text: str) -> Listen | None:
    """Parse host:port (IPv6 in brackets); empty means no TCP listener. Raises BadSetting."""
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65_535:
        raise BadSetting(setting="listen", problem=f"{text!r} is not host:port")
    return Listen(host=host or "0.0.0.0", port=int(port))  # noqa: S104 - what an empty host means; TLS and token guard it


def parse_port_range(text: str) -> tuple[int, int]:
    """Parse first-last, both ports that need no right of their own. Raises BadSetting."""
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
        raise BadSetting(setting="published_ports", problem=f"{text!r} is not first-last")
    if not 1024 <= int(first) <= int(last) <= 65_535:
        raise BadSetting(setting="published_ports", problem=f"{text} is not within 1024-65535")
    return int(first), int(last)


def default_run_dir(instance: str) -> Path:
    """Where sockets live: /run for root, the user's runtime directory otherwise."""
    if os.geteuid() == 0:
        return Path("/run") / instance
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / instance if runtime else Path(f"/tmp/{instance}-{os.geteuid()}")  # noqa: S108 - made 0700 and checked
