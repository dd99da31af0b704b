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
from fusevm.control.store.host_rows import sealed_owner
from fusevm.control.store.protocol import SealedRow, Secrets
from fusevm.control.stub_host import CAPACITY, STUB_ID, STUB_URL, StubHost
from fusevm.model.errors import BadSetting, HostNotFound, RevisionConflict, WrongCluster
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

    async def has_hosts(self) -> bool:
        """Is any host known? One whose record cannot be read counts."""
        ...

    async def save_host(self, host: Host, sealed: SealedRow | None = None) -> Host:
        """Insert or replace, with its token. Raises RevisionConflict."""
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
        again = await self._store.host(host_id)
        if again is None or again.url != host.url:
            # It was registered again between the readings: URL and token must belong together.
            return await self._read(host_id, before)
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

        Raises HostUnreachable, HostRejected, HostUnproven, Timeout, WrongCluster.
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
        """Make the configured hosts exist; without any, the stub host. Idempotent: settings say how a known host is
        reached; the rest is as it was declared over the API."""
        for setting in settings:
            new = replace(_new_host(setting.id, setting.url, Resources()), region=setting.region, labels=setting.labels)
            await self._save(new, setting.token, _reached)
        if not await self._store.has_hosts():
            await self.save(_new_host(STUB_ID, STUB_URL, CAPACITY), "")

    async def token_of(self, host_id: str) -> str:
        """The token that is kept for a host; empty: none."""
        return await load_secret(self._store, self._sealer, sealed_owner(host_id), _TOKEN) or ""

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
        return await self._save(new, token, _declared)

    async def _save(self, new: Host, token: str, update: Callable[[Host, Host], Host]) -> Host:
        """Record and token are saved together: a token that belongs to another URL would be refused."""
        if new.url != STUB_URL:
            await self._retire_stub()
        while True:
            with contextlib.suppress(RevisionConflict):
                saved = await self._try_save(new, token, update)
                await self._drop_client(new.id)
                return saved

    async def _try_save(self, new: Host, token: str, update: Callable[[Host, Host], Host]) -> Host:
        old, now_ms = await self._store.host(new.id), self._clock.now_ms()
        sealed = await self._sealed(new.id, token)  # after the record: a newer token than its own is a conflict
        if old is None:
            saved = await self._store.save_host(replace(new, created_at_ms=now_ms, updated_at_ms=now_ms), sealed)
            log.info("host_registered", host=new.id, url=new.url)
            return saved
        changed = update(old, new)
        if changed == old and sealed is None:
            return old
        return await self._store.save_host(replace(changed, updated_at_ms=now_ms), sealed)

    async def _sealed(self, host_id: str, token: str) -> SealedRow | None:
        """What is to be kept; None: what is kept already."""
        if not token:
            return None
        with contextlib.suppress(BadSetting):  # it was sealed with a key that is no more: it is replaced
            if await self.token_of(host_id) == token:
                return None
        owner = sealed_owner(host_id)
        return SealedRow(owner, _TOKEN, self._sealer.seal(token, row=row_of(owner, _TOKEN)))

    async def forget(self, host_id: str) -> None:
        """The host was deleted: its client goes."""
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


def _reached(old: Host, new: Host) -> Host:
    """A known host, as it is reached now."""
    return replace(old, url=new.url)


def _declared(old: Host, new: Host) -> Host:
    """A known host, as it is declared now."""
    return replace(
        old,
        url=new.url,
        region=new.region,
        labels=new.labels,
        arch=new.arch if new.capacity != Resources() else old.arch,
        declared=new.declared,
        capacity=effective(new.declared, new.capacity if new.capacity != Resources() else old.capacity),
    )
