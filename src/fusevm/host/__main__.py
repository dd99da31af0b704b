"""`python -m fusevm.host`: the daemon without the `fuse` command, for tests and unit files."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fusevm.host.config import DEFAULT_LISTEN, HostConfig
from fusevm.host.faults import VARIABLE
from fusevm.host.main import serve
from fusevm.model.errors import Error
from fusevm.wire.exit_status import exit_status


def main() -> int:
    """Parse the command line and serve; the exit status."""
    try:
        return serve(make_config(make_parser().parse_args()))
    except Error as error:
        sys.stderr.write(f"fuse host: {error.message}\n")
        return exit_status(error)


def make_config(args: argparse.Namespace) -> HostConfig:
    """The configuration of a command line; what was not said keeps its default."""
    said = {name: value for name, value in vars(args).items() if value is not None}
    return HostConfig(**said, fault=os.environ.get(VARIABLE, ""))


def make_parser() -> argparse.ArgumentParser:
    """Options are the fields of the configuration."""
    parser = argparse.ArgumentParser(prog="python -m fusevm.host", description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="journal, disks, keys")
    parser.add_argument("--run-dir", type=Path, help="sockets; a short path")
    parser.add_argument("--artefact-root", type=Path, help="images and kernels (default: the data root)")
    parser.add_argument("--listen", help=f"host:port for TCP, empty for none (default: {DEFAULT_LISTEN})")
    parser.add_argument("--plain-http", action="store_const", const=True, help="no TLS; loopback only")
    parser.add_argument("--socket-path", type=Path, help="Unix socket of the API")
    drivers = ["auto", "firecracker", "qemu"]
    parser.add_argument("--driver", choices=drivers, help="qemu: software emulation, without trying KVM")
    parser.add_argument("--firecracker-binary", type=Path, help="the program firecracker")
    parser.add_argument("--jailer-binary", type=Path, help="the program jailer")
    parser.add_argument("--kernel", type=Path, help="kernel file")
    parser.add_argument("--network-range", help="IPv4 network of the machines' slots")
    parser.add_argument("--egress-interface", help="interface that leads to the Internet")
    parser.add_argument("--published-ports", help="ports of the host that machines may publish: first-last")
    parser.add_argument("--instance", help="prefix of all kernel objects")
    parser.add_argument("--user-network", action="store_const", const=True, help="without root: open user network")
    parser.add_argument("--console-bytes", type=int, help="console output kept per machine")
    parser.add_argument("--disk-bytes-per-s", type=int, help="limit of each disk of a machine; 0: none")
    parser.add_argument("--disk-ops-per-s", type=int, help="limit of each disk of a machine; 0: none")
    parser.add_argument("--max-machines", type=int, help="machines at the same time")
    parser.add_argument("--cpu-ratio", type=float, help="virtual CPUs given out per CPU of the host")
    parser.add_argument("--disk-ratio", type=float, help="bytes of disk given out per byte of the file system")
    parser.add_argument("--ram-reserve-mib", type=int, help="memory kept for the host itself")
    parser.add_argument("--cpu-reserve", type=int, help="CPUs kept for the host itself")
    parser.add_argument("--warm-slots", type=int, help="network slots kept ready")
    parser.add_argument("--sweep-interval-s", type=float, help="seconds between sweeps for leftovers")
    parser.add_argument("--login-ca", help="public key of the SSH authority that machines of the contract trust")
    parser.add_argument("--disk-reserve-bytes", type=int, help="creates are refused below this free space")
    parser.add_argument("--image-max-bytes", type=int, help="largest root file system")
    parser.add_argument("--image-high-percent", type=int, help="disk use from which images are removed")
    parser.add_argument("--image-low-percent", type=int, help="disk use down to which images are removed")
    parser.add_argument("--artifact-networks", type=_words, help="networks, by commas, that artifacts may come from")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
