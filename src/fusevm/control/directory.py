"""Which host id is spoken to how: opens and keeps one client per host, and registers the configured hosts at start."""

from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
from msgspec.structs import replace

from fusevm.control.clock import Clock
from fusevm.control.config import HostSetting
from fusevm.control.dial import Endpoint
from fusevm.control.host_api import HostApi
from fusevm.control.host_client import HttpHost
from fusevm.control.secrets import Sealer
from fusevm.control.store.protocol import Secrets
from fusevm.control.stub_host import CAPACITY, STUB_ID, STUB_URL, StubHost
from fusevm.model.errors import HostNotFound
from fusevm.model.host import Host, HostState, Resources

log = structlog.get_logger()
_TOKEN = "token"  # noqa: S105 - the name of the secret


class HostStore(Secrets, Protocol):
    """What the directory needs of the store."""

    async def host(self, id: str) -> Host | None:  # noqa: A002 - the record's field
        """One host."""
        ...

    async def hosts(self) -> list[Host]:
        """All hosts by id."""
        ...

    async def save_host(self, host: Host) -> Host:
        """Insert or replace."""
        ...


class Directory:
    """Clients of hosts, by id."""

    def __init__(self, store: HostStore, sealer: Sealer, clock: Clock, version: str) -> None:
        self._store = store
        self._sealer = sealer
        self._clock = clock
        self._version = version
        self._clients: dict[str, HostApi] = {}
        self._closers: list[Callable[[], Awaitable[None]]] = []

    def put(self, host_id: str, client: HostApi) -> None:
        """Speak to a host through this client."""
        self._clients[host_id] = client

    async def client(self, host_id: str) -> HostApi:
        """The client of a registered host. Raises HostNotFound, BadSetting."""
        found = self._clients.get(host_id)
        if found is None:
            found = self._clients.setdefault(host_id, await self._open(host_id))
        return found

    async def _open(self, host_id: str) -> HostApi:
        host = await self._store.host(host_id)
        if host is None:
            raise HostNotFound(id=host_id)
        if host.url == STUB_URL:
            return StubHost(self._version)
        sealed = await self._store.get_secret(_owner(host_id), _TOKEN)
        token = self._sealer.open(sealed, row=_row(host_id)) if sealed else ""
        client = HttpHost(Endpoint(host_id, host.url, token))
        self._closers.append(client.close)
        return client

    async def register(self, settings: tuple[HostSetting, ...]) -> None:
        """Make the configured hosts exist; without any, the stub host. Idempotent: capacity and bookings are kept."""
        for setting in settings:
            if setting.token:
                await self._store.put_secret(
                    _owner(setting.id), _TOKEN, self._sealer.seal(setting.token, row=_row(setting.id))
                )
            await self._save(setting.id, setting.url, setting.region, setting.labels, Resources())
        known = await self._store.hosts()
        if not known:
            await self._save(STUB_ID, STUB_URL, "", {}, CAPACITY)
        for host in known:
            if settings and host.url == STUB_URL and host.state is HostState.ACTIVE:
                # A real host has come: nothing new is pretended any more.
                await self._store.save_host(replace(host, state=HostState.CORDONED))

    async def _save(self, host_id: str, url: str, region: str, labels: dict[str, str], capacity: Resources) -> None:
        now_ms = self._clock.now_ms()
        old = await self._store.host(host_id)
        if old is None:
            new = Host(
                id=host_id,
                url=url,
                region=region,
                labels=labels,
                capacity=capacity,
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
            await self._store.save_host(new)
            log.info("host_registered", host=host_id, url=url)
        elif (old.url, old.region, old.labels) != (url, region, labels):
            await self._store.save_host(replace(old, url=url, region=region, labels=labels, updated_at_ms=now_ms))

    async def close(self) -> None:
        """Close every client."""
        for close in self._closers:
            await close()


def _owner(host_id: str) -> str:
    return f"host:{host_id}"


def _row(host_id: str) -> str:
    return f"{_owner(host_id)}/{_TOKEN}"
