"""The composition root of the host daemon: `serve` builds every part, in the order of this file, and takes them down
in reverse. VMMs outlive it.

Owns: the order. Must not: decide anything that a part could.
"""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import secrets
import signal
import socket
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import structlog
import uvloop

from fusevm import __version__
from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.cgroup import Cgroups, observe_mounts
from fusevm.host.clock import SystemClock
from fusevm.host.config import HostConfig, parse_listen, parse_port_range
from fusevm.host.daemon import Daemon, Identification
from fusevm.host.drift import Kind
from fusevm.host.driver_choice import choose_engine
from fusevm.host.engine import ChooseEngine, Engine
from fusevm.host.events import EventHub
from fusevm.host.faults import Fault, make_fault
from fusevm.host.grounds import (
    Contents,
    Directories,
    Ground,
    Groups,
    Links,
    Mounts,
    Processes,
    Slots,
    Snapshots,
    Witness,
)
from fusevm.host.image_service import ImageService
from fusevm.host.images.artifact import make_policy
from fusevm.host.images.store import ImageStore
from fusevm.host.images.workspace import write_durably
from fusevm.host.journal import Journal, lock_directory
from fusevm.host.listeners import bind_tcp, bind_unix, find_instance_lock, lock_instance, remove_socket, serving
from fusevm.host.logs import configure_logging
from fusevm.host.machines import Machines
from fusevm.host.metrics import Metrics
from fusevm.host.net.network import HostNetwork
from fusevm.host.net.plan import NetworkPlan
from fusevm.host.net.terms import Terms
from fusevm.host.net.tracking import ensure_room, machines_at_once
from fusevm.host.process import boot_id
from fusevm.host.quarters import HostQuarters
from fusevm.host.rows import Entry
from fusevm.host.snapshots.folders import SnapshotFolders
from fusevm.host.snapshots.keeper import SnapshotKeeper
from fusevm.host.snapshots.ledger import Ledger
from fusevm.host.surroundings import Surroundings
from fusevm.host.sweep import Sweeper
from fusevm.host.tls import Identity, ensure_identity, make_ssl_context
from fusevm.host.wiring import SlotWiring, UserWiring, Wiring, terms_of
from fusevm.model.errors import Error

log = structlog.get_logger()

STATE_FILE = "host.json"


def serve(config: HostConfig, engines: ChooseEngine = choose_engine, fault: Fault | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; the exit status. Raises Error when it cannot start."""
    configure_logging()
    try:
        config.check()
        raise_file_limit()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, engines, fault or make_fault(config.fault)))
    except Error as e:
        log.critical("not_started", reason=e.reason, problem=e.message)
        raise
    return 0


def raise_file_limit() -> None:
    """Allow this process as many descriptors as it may have: a machine takes some, and the usual 1024 end at 200."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What no second daemon can have: directories, instance name, addresses."""

    journal: Journal
    #: Bound, not yet served.
    unix: socket.socket
    tcp: socket.socket | None
    identity: Identity


async def _serve(config: HostConfig, engines: ChooseEngine, fault: Fault) -> None:
    stop = _watch_signals()
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        place = await _take_place(stack, config, fault, clock)
        metrics = Metrics()
        engine = await engines(config, metrics.count_vmms)
        daemon = await _make_daemon(stack, config, place.journal, engine, metrics, clock, fault)
        await _open_doors(stack, config, place, daemon)
        address = place.tcp.getsockname() if place.tcp is not None else None
        await asyncio.to_thread(_announce, config, place.identity, engine, address)
        await stop.wait()
        log.info("stopping", machines=len(daemon.machines.records()))


async def _take_place(stack: AsyncExitStack, config: HostConfig, fault: Fault, clock: SystemClock) -> Place:
    """From here on nobody else works in these directories, under this name, or at these addresses."""
    find_instance_lock(config.instance)  # first of all: it looks whose the runtime directory is
    stack.callback(os.close, await asyncio.to_thread(lock_directory, config.runtime_directory))
    stack.enter_context(lock_instance(config.instance))
    journal = await Journal.open(config.data_root, fault, clock.now_ms)
    stack.push_async_callback(journal.close)
    listen = parse_listen(config.listen)
    tcp = stack.enter_context(bind_tcp(listen)) if listen is not None else None
    unix = stack.enter_context(bind_unix(config.api_socket))
    stack.callback(remove_socket, config.api_socket)
    # Written when everything serves, and only there while it does.
    state_file = config.data_root / STATE_FILE
    await asyncio.to_thread(state_file.unlink, missing_ok=True)
    stack.callback(state_file.unlink, missing_ok=True)
    identity = await asyncio.to_thread(ensure_identity, config.data_root)
    return Place(journal=journal, unix=unix, tcp=tcp, identity=identity)


async def _make_daemon(
    stack: AsyncExitStack,
    config: HostConfig,
    journal: Journal,
    engine: Engine,
    metrics: Metrics,
    clock: SystemClock,
    fault: Fault,
) -> Daemon:
    """Build what machines are made of and who does the work, and let it run."""
    images = ImageStore(config.artefacts)
    wiring, network = await _make_wiring(config, engine)
    cgroups = await _make_cgroups(config)
    quarters = HostQuarters(
        config,
        images=images,
        boot_files=engine.boot_files,
        wiring=wiring,
        cgroups=cgroups,
        driver=engine.driver.name,
        overhead_mib=engine.overhead_mib,
        overlays=engine.overlays,
        fault=fault,
    )
    entries = await journal.entries()
    await quarters.open(_slots_in_use(entries))
    stack.push_async_callback(quarters.close)

    ledger, folders = Ledger(journal, clock.now_ms), SnapshotFolders(config.data_root / "snapshots")
    parts = Surroundings(
        journal=journal,
        ledger=ledger,
        quarters=quarters,
        disks=quarters.disks,
        snapshot_folders=folders,
        driver=engine.driver,
        events=EventHub(secrets.token_hex(8), clock.now_ms),
        metrics=metrics,
        clock=clock,
        fault=fault,
        boot_id=boot_id,
    )
    machines = Machines(parts)
    image_service = ImageService(config, images, journal, metrics)
    metrics.watch_machines(machines, lambda: parts.events.subscribers)
    daemon = Daemon(
        config,
        parts,
        images=image_service,
        artifacts=image_service.artifacts,
        sweeper=_make_sweeper(config, machines, cgroups, network, Snapshots(folders.sizes, ledger.load_all)),
        machines=machines,
        network=network,
        snapshots=SnapshotKeeper(ledger, folders, machines, parts, make_policy(config)),
        identification=_identify(engine, wiring),
    )
    await stack.enter_async_context(daemon.running(entries))
    return daemon


async def _open_doors(stack: AsyncExitStack, config: HostConfig, place: Place, daemon: Daemon) -> None:
    """Let in root on the Unix socket, and holders of the token on TCP."""
    router = make_router(daemon)
    await stack.enter_async_context(serving(place.unix, Boundary(router, daemon.metrics, secret=None)))
    if place.tcp is not None:
        tls = None if config.plain_http else make_ssl_context(place.identity)
        app = Boundary(router, daemon.metrics, secret=place.identity.secret)
        await stack.enter_async_context(serving(place.tcp, app, tls))
    stack.callback(daemon.events.close)


def _watch_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _make_wiring(config: HostConfig, engine: Engine) -> tuple[Wiring, HostNetwork | None]:
    """Slots for root, QEMU's user network for everybody else."""
    ports = parse_port_range(config.published_ports)
    if os.geteuid() != 0:
        if config.user_network:
            log.warning("user_network_open", problem="machines reach whatever this user reaches, the host included")
        return UserWiring(user_network=config.user_network, ports=ports), None
    plan = NetworkPlan(
        prefix=config.instance,
        range=config.network_range,
        mtu=config.network_mtu,
        max_connections=await ensure_room(machines_at_once(config.max_machines)),
    )
    network = HostNetwork(plan, uplink=config.egress_interface, warm=config.warm_slots)
    return SlotWiring(plan, network, ports, taps=engine.taps), network


async def _make_cgroups(config: HostConfig) -> Cgroups | None:
    if os.geteuid() != 0:
        return None
    return Cgroups(f"{config.instance}/machines", await asyncio.to_thread(observe_mounts))


def _make_sweeper(
    config: HostConfig,
    machines: Machines,
    cgroups: Cgroups | None,
    network: HostNetwork | None,
    snapshots: Snapshots,
) -> Sweeper:
    folder, run_dir, records = config.data_root / "machines", config.runtime_directory, machines.records
    # Processes first: nothing may use what is removed next.
    grounds: list[Ground] = [Processes(folder, records)]
    grounds += [Groups(cgroups)] if cgroups is not None and cgroups.roots() else []
    grounds += [
        Mounts(folder, run_dir),
        Directories(Kind.MACHINE_DIRECTORY, folder),
        Directories(Kind.RUN_DIRECTORY, run_dir),
    ]
    witnesses: list[Witness] = [Contents(folder, run_dir)]
    slots = None
    if network is not None:
        witnesses.append(Links(network, records))
        slots = Slots(network, records)
    return Sweeper(grounds, machines.claims, witnesses=witnesses, slots=slots, snapshots=snapshots, tidy=machines.tidy)


def _slots_in_use(entries: list[Entry]) -> dict[int, Terms]:
    """Slots that belong to machines, with what these are granted."""
    return {entry.machine.slot: terms_of(entry.machine) for entry in entries if entry.machine.slot >= 0}


def _identify(engine: Engine, wiring: Wiring) -> Identification:
    files = engine.boot_files.found
    return Identification(
        driver=engine.title,
        driver_reason=engine.why,
        isolation=wiring.isolation,
        arch={"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        kernel=files.kernel_version if files is not None else "",
        agent_version=files.agent_version if files is not None else "",
        vmm_version=engine.version,
    )


def _announce(config: HostConfig, identity: Identity, engine: Engine, address: tuple[Any, ...] | None) -> None:
    """Say where we are: a file for programs, a line for people."""
    urls = [f"unix://{config.api_socket}"]
    if address is not None:
        host, port = address[0], address[1]
        urls.append(f"{'http' if config.plain_http else 'https'}://{f'[{host}]' if ':' in host else host}:{port}")
    state = {
        "pid": os.getpid(),
        "version": __version__,
        "urls": urls,
        "token_file": str(config.data_root / "token"),
        "pin": identity.pin,
        "driver": engine.title,
        "driver_reason": engine.why,
    }
    write_durably(
        config.data_root / STATE_FILE, msgspec.json.format(msgspec.json.encode(state)), mode=0o644, is_alone=True
    )
    log.info("ready", **state)
