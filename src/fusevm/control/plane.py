"""The parts of a running control plane, as handlers see them. Put together by `main`."""

import asyncio
from dataclasses import dataclass, field

from fusevm.control.clock import Clock
from fusevm.control.collector import Collector
from fusevm.control.command_log import CommandLog
from fusevm.control.config import ControlConfig
from fusevm.control.directory import Directory
from fusevm.control.entry import Entry
from fusevm.control.fanout import Fanout
from fusevm.control.fleet_gauges import Fleet
from fusevm.control.metrics import Metrics
from fusevm.control.secrets import Sealer
from fusevm.control.signals import Signals
from fusevm.control.store.protocol import Store
from fusevm.control.vault import Vault


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One control plane."""

    config: ControlConfig
    version: str
    clock: Clock
    store: Store
    signals: Signals
    entry: Entry
    directory: Directory
    vault: Vault
    collector: Collector
    commands: CommandLog
    sealer: Sealer
    metrics: Metrics
    fleet: Fleet
    #: Set when the server begins to close: streams end, waits return.
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    #: What the event streams share.
    fanout: Fanout = field(default_factory=Fanout)
