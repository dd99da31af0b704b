"""What can be known to be wrong before `fuse up` writes anything: settings, files, programs, routes, addresses, rivals.

Only looks. What it cannot see (a disk that fills up meanwhile) the daemons refuse.
"""

import asyncio
import datetime as dt
import os
from pathlib import Path

import msgspec

from fusevm.cli.addresses import choose_address
from fusevm.cli.building import carry_out
from fusevm.cli.host_settings import host_config
from fusevm.cli.installation import CONTROL_LISTEN, HOST_LISTEN, find_predecessor, take_lock
from fusevm.cli.places import Places
from fusevm.cli.serve import control_config
from fusevm.cli.settings import Loaded
from fusevm.control.config import ControlConfig
from fusevm.control.config import check as check_control
from fusevm.control.tls import check_pair
from fusevm.host.config import HostConfig
from fusevm.host.images.bzimage import NotAKernel, extract_elf
from fusevm.host.images.debian import RECIPES
from fusevm.host.images.initramfs import agent_path
from fusevm.host.images.store import ImageStore
from fusevm.host.listeners import lock_instance
from fusevm.host.net.plan import PREFIX_SETTING, NetworkPlan, check_range
from fusevm.host.net.uplink import observe_routes, observe_uplinks
from fusevm.host.vmm.launch import find_program
from fusevm.host.vmm.qemu import PROGRAM, REMEDY
from fusevm.model.errors import BadSetting, KernelCorrupt, NetworkRangeConflict

#: In place of the token that an installation makes for itself.
_SOME_TOKEN = "to-be-made"  # noqa: S105 - no secret


def check_start(places: Places, control: Loaded, host: Loaded, image: str) -> None:
    """Raise the Error of the first thing that would keep Fuse from starting. Leaves everything as it was."""
    if places.lock.exists():
        take_lock(places).close()
    with host.naming_sources():
        config = msgspec.structs.replace(host_config(host, os.environ), data_root=places.host)
        config.check()
        network = _plan_network(config)
    with control.naming_sources():
        check_control(_expected_control(places, control))
        _check_certificate(control)
    find_program(PROGRAM, REMEDY)
    agent_path()
    if os.geteuid() == 0:  # without, machines have no network of the host's
        with host.naming_sources():
            carry_out(_check_routes(network, config.egress_interface, named=host.source("network_range")))
    carry_out(_check_parts(host["artefact_root"] or places.data, config.kernel, image))
    if not find_predecessor(places):
        _check_addresses(control, host, config)


def _plan_network(config: HostConfig) -> NetworkPlan:
    try:
        return NetworkPlan(prefix=config.instance, range=config.network_range, mtu=config.network_mtu)
    except BadSetting as error:
        if error.setting != PREFIX_SETTING:
            raise
        raise BadSetting(setting="instance", problem=error.problem) from error


def _expected_control(places: Places, control: Loaded) -> ControlConfig:
    """What the control plane will be started with, as far as it is known."""
    return msgspec.structs.replace(
        control_config(control),
        listen=control["listen"] if control.is_given("listen") else CONTROL_LISTEN,
        auth_token=control["auth_token"] or _SOME_TOKEN,
        database=str(places.control / "fuse.db"),
        hosts=(),
    )


def _check_certificate(control: Loaded) -> None:
    if not control["tls_cert"]:
        return
    check_pair(control["tls_cert"], control["tls_key"], dt.datetime.now(dt.UTC))


async def _check_routes(network: NetworkPlan, egress_interface: str, named: str) -> None:
    """Raise NetworkRangeConflict for a range that this machine uses already, BadSetting for an unknown interface."""
    try:
        check_range(network, await observe_routes())
    except NetworkRangeConflict as error:
        raise NetworkRangeConflict(range=error.range, route=error.route, setting=named) from error
    await observe_uplinks(egress_interface)


async def _check_parts(artefacts: Path, kernel: Path | None, image: str) -> None:
    if kernel is not None:
        await check_kernel(kernel)
    if image and image not in RECIPES:
        await ImageStore(artefacts).resolve(image)


async def check_kernel(path: Path) -> None:
    """Raise KernelCorrupt unless a kernel can be taken out of the file."""
    try:
        await extract_elf(await asyncio.to_thread(path.read_bytes))
    except OSError as error:
        raise KernelCorrupt(path=str(path), problem=error.strerror or str(error)) from error
    except NotAKernel as error:
        raise KernelCorrupt(path=str(path), problem=str(error)) from error


def _check_addresses(control: Loaded, host: Loaded, config: HostConfig) -> None:
    choose_address(host, "host_listen", HOST_LISTEN)
    choose_address(control, "listen", CONTROL_LISTEN)
    with lock_instance(config.instance):
        pass
