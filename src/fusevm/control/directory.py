"""Which host id is spoken to how: opens and keeps one client per host, and registers the configured hosts at start."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog
from msgspec.structs import replace

from fusevm.control.clock import Clock
from fusevm.control.config import HostSetting
from fusevm.control.dial import Endpoint
from fusevm.control.host_api import HostApi
from fusevm.control.host_client import HttpHost
from fusevm.control.secrets import Sealer, load_secret, row_of
from fusevm.control.store.protocol import Secrets
from fusevm.control.stub_host import CAPACITY, STUB_ID, STUB_URL, StubHost
from fusevm.model.errors import HostNotFound, RevisionConflict, WrongCluster
from fusevm.model.host import Host, HostState, Resources, effective
from fusevm.wire.host_api import HostFacts

log = structlog.get_logger()
#: How long a client is used without a look at the record: another replica may have changed it.
READ_AGAIN_MS = 5_000
_TOKEN = "token"  # noqa: S105 - the name of the secret


class _Known(NamedTuple):
    """A client, and what it was made of."""

    client: HostApi
    url: str
    token: str
    read_at_ms: int


class HostStore(Secrets, Protocol):
    """What the directory needs of the store."""

    #: Id of the cluster.
    cluster: str

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

    def __init__(
        self,
        store: HostStore,
        sealer: Sealer,
        clock: Clock,
        version: str,
        dial: Callable[[Endpoint], HostApi] = HttpHost,
    ) -> None:
        self._store = store
        self._sealer = sealer
        self._clock = clock
        self._version = version
        self._dial = dial
        self._known: dict[str, _Known] = {}
        self._fixed: dict[str, HostApi] = {}

    def put(self, host_id: str, client: HostApi) -> None:
        """Speak to a host through this client, whatever its record says."""
        self._fixed[host_id] = client

    async def client(self, host_id: str) -> HostApi:
        """The client of a registered host. Raises HostNotFound, BadSetting."""
        if host_id in self._fixed:
            return self._fixed[host_id]
        found = self._known.get(host_id)
        if found is not None and self._clock.now_ms() - found.read_at_ms < READ_AGAIN_MS:
            return found.client
        return await self._read(host_id, found)

    async def _read(self, host_id: str, before: "_Known | None") -> HostApi:
        """Make the client from the record; keep the one before if nothing has changed."""
        host = await self._store.host(host_id)
        if host is None:
            await self._drop_client(host_id)
            raise HostNotFound(id=host_id)
        token = await self.token_of(host_id)
        if before is not None and (before.url, before.token) == (host.url, token):
            client = before.client
        else:
            await self._drop_client(host_id)
            client = self._open(host_id, host.url, token)
        self._known[host_id] = _Known(client, host.url, token, self._clock.now_ms())
        return client

    def _open(self, host_id: str, url: str, token: str) -> HostApi:
        if url == STUB_URL:
            return StubHost(self._version)
        return self._dial(Endpoint(host_id, url, token))

    async def probe(self, id: str, url: str, token: str) -> HostFacts:  # noqa: A002 - the record's field
        """Ask a host that may not be registered who it is.

        Raises HostUnreachable, HostRejected, Timeout, WrongCluster.
        """
        client = HttpHost(Endpoint(id, url, token))
        try:
            facts = await client.info()
        finally:
            await client.close()
        if facts.cluster not in ("", self._store.cluster):
            raise WrongCluster(cluster=facts.cluster, asked=self._store.cluster)
        return facts

    async def register(self, settings: tuple[HostSetting, ...]) -> None:
        """Make the configured hosts exist; without any, the stub host. Idempotent: capacity and bookings are kept."""
        for setting in settings:
            old = await self._store.host(setting.id)
            host = _new_host(setting.id, setting.url, Resources())
            # Settings cannot say a capacity: what was declared over the API holds on.
            declared = old.declared if old is not None else Resources()
            host = replace(host, region=setting.region, labels=setting.labels, declared=declared)
            await self.save(host, setting.token)
        if not await self._store.hosts():
            await self.save(_new_host(STUB_ID, STUB_URL, CAPACITY), "")

    async def token_of(self, host_id: str) -> str:
        """The token that is kept for a host; empty: none."""
        return await load_secret(self._store, self._sealer, _owner(host_id), _TOKEN) or ""

    async def _retire_stub(self) -> None:
        """A real host has come: nothing new is pretended any more."""
        while (stub := await self._store.host(STUB_ID)) is not None:
            if stub.url != STUB_URL or stub.state is not HostState.ACTIVE:
                return
            with contextlib.suppress(RevisionConflict):
                await self._store.save_host(replace(stub, state=HostState.CORDONED))

    async def save(self, new: Host, token: str) -> Host:
        """Insert a host, or update what was declared of a known one; its bookings, cordon, health and age stay.

        Raises NoEncryptionKey when there is a token and nothing to seal it with.
        """
        if token:
            sealed = self._sealer.seal(token, row=row_of(_owner(new.id), _TOKEN))
            await self._store.put_secret(_owner(new.id), _TOKEN, sealed)
        await self._drop_client(new.id)
        if new.url != STUB_URL:
            await self._retire_stub()
        while True:
            old = await self._store.host(new.id)
            try:
                if old is None:
                    now_ms = self._clock.now_ms()
                    saved = await self._store.save_host(replace(new, created_at_ms=now_ms, updated_at_ms=now_ms))
                    log.info("host_registered", host=new.id, url=new.url)
                    return saved
                return await self._update(old, new)
            except RevisionConflict:
                continue

    async def _update(self, old: Host, new: Host) -> Host:
        changed = replace(
            old,
            url=new.url,
            region=new.region,
            labels=new.labels,
            arch=new.arch if new.capacity != Resources() else old.arch,
            declared=new.declared,
            capacity=effective(new.declared, new.capacity if new.capacity != Resources() else old.capacity),
        )
        if changed == old:
            return old
        return await self._store.save_host(replace(changed, updated_at_ms=self._clock.now_ms()))

    async def forget(self, host_id: str) -> None:
        """The host was deleted: its token and its client go."""
        await self._store.drop_secrets(_owner(host_id))
        await self._drop_client(host_id)

    async def _drop_client(self, host_id: str) -> None:
        known = self._known.pop(host_id, None)
        if known is not None and isinstance(known.client, HttpHost):
            await known.client.close()

    async def close(self) -> None:
        """Close every client."""
        for host_id in list(self._known):
            await self._drop_client(host_id)


def _new_host(host_id: str, url: str, capacity: Resources) -> Host:
    return Host(id=host_id, url=url, capacity=capacity, created_at_ms=0, updated_at_ms=0)


def _owner(host_id: str) -> str:
    return f"host:{host_id}"
