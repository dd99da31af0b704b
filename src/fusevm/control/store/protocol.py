"""What the control plane needs of a store, grouped by who asks. Nothing else about a database is known outside.

Rules every store keeps:
- A write is one transaction; when the call returns, it is durable. A cancelled call may still have been carried out.
- `commit` is a compare-and-swap on `revision`, refuses transitions that are not in the table, saves record, facts and
  pending action together, and gives up the placement with the terminal state.
- Leases end by database time. A lease is about one action: a commit that replaces the action ends it.
- Every committed record is shown to the listener, also when the caller was cancelled meanwhile.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from fusevm.core.invariants import World
from fusevm.core.lifecycle import Step
from fusevm.model.environment import Environment
from fusevm.model.fact import Fact
from fusevm.model.host import Host, Resources


class ReservationLost(Exception):
    """The host filled up between plan and booking: plan again."""


class Claim(msgspec.Struct, frozen=True):
    """Who performs an action, and for how long that is believed."""

    owner: str
    lease_ms: int


class Committed(msgspec.Struct, frozen=True):
    """A record as it was saved, and the owner of the lease if this very commit gave one out."""

    record: Environment
    leased_to: str | None = None


class Reservation(msgspec.Struct, frozen=True):
    """What to book on which host, if `fits` says so about the host as it is in the booking transaction."""

    host_id: str
    resources: Resources
    fits: Callable[[Host], bool]


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """One page of environments. Live ones come by ascending uid, ended ones by descending uid."""

    task_id: str = ""
    state: str = ""
    host_id: str = ""
    ended: bool = False
    #: uid of the last one of the page before.
    after: str = ""
    limit: int = 50


class Due(msgspec.Struct, frozen=True):
    """What waits for a worker: pending actions that nobody holds, and deadlines that have passed."""

    actions: tuple[tuple[str, int], ...] = ()
    deadlines: tuple[str, ...] = ()


class StoredFact(msgspec.Struct, frozen=True):
    """A fact with its place in the global order."""

    position: int
    task_id: str
    fact: Fact


class RequestKey(msgspec.Struct, frozen=True):
    """An Idempotency-Key in its scope, and what the request was."""

    tenant: str
    route: str
    key: str
    #: SHA-256 over the body.
    fingerprint: str


class StoredRequest(msgspec.Struct, frozen=True):
    """What is known of a request that came before. `status` 0: no answer yet."""

    fingerprint: str
    uid: str
    status: int
    body: str
    claimed_at_ms: int


class Records(Protocol):
    """Environments."""

    async def create(
        self, step: Step, reservation: Reservation, claim: Claim | None, key: RequestKey | None = None
    ) -> Environment:
        """Insert a new environment, book its place and bind the request key, or do none of it.

        Raises TaskExists, ReservationLost, StoreFull.
        """
        ...

    async def commit(self, uid: str, revision: int, step: Step, claim: Claim | None) -> Environment:
        """Save what an event led to; the answer carries the new revision.

        A new pending action is leased to `claim`; an unchanged one keeps its lease. Raises RevisionConflict, StoreFull,
        and Internal for a transition that the table forbids.
        """
        ...

    async def get(self, uid: str) -> Environment | None:
        """The record, live or ended."""
        ...

    async def live(self, task_id: str) -> Environment | None:
        """The live environment of a task."""
        ...

    async def last_ended(self, task_id: str) -> Environment | None:
        """The newest ended environment of a task."""
        ...

    async def list_page(self, query: Query) -> list[Environment]:
        """At most `query.limit` records."""
        ...

    async def count_live(self) -> dict[str, int]:
        """State to number of live environments."""
        ...


class Leases(Protocol):
    """Who works on what."""

    async def due(self, limit: int) -> Due:
        """What waits for a worker now, oldest first."""
        ...

    async def acquire(self, uid: str, seq: int, claim: Claim) -> Environment | None:
        """Take the pending action if it is still this one and nobody holds it."""
        ...

    async def renew(self, held: Sequence[tuple[str, int]], claim: Claim) -> set[tuple[str, int]]:
        """Prolong leases; the answer says which are still held."""
        ...

    async def release(self, owner: str, held: Sequence[tuple[str, int]] | None = None) -> None:
        """Give leases back; None: all of the owner's, those on hosts too."""
        ...


class Facts(Protocol):
    """The numbered events."""

    async def facts_of(self, uid: str, after_seq: int, limit: int) -> list[StoredFact]:
        """Facts of one environment with a higher number."""
        ...

    async def facts_after(self, position: int, limit: int) -> list[StoredFact]:
        """Facts of all environments in global order. None is ever inserted before one that was read."""
        ...

    async def position_of(self, uid: str, seq: int) -> int | None:
        """Place of a fact in the global order; None when it is not kept."""
        ...

    async def last_position(self) -> int:
        """Place of the newest fact; 0: there is none."""
        ...


class Hosts(Protocol):
    """Hosts; `allocated` is kept by `create` and `commit`."""

    async def hosts(self) -> list[Host]:
        """All hosts by id."""
        ...

    async def host(self, id: str) -> Host | None:  # noqa: A002 - the record's field
        """One host."""
        ...

    async def save_host(self, host: Host) -> Host:
        """Insert (revision 0) or replace by compare-and-swap; `allocated` is ignored. Raises RevisionConflict."""
        ...

    async def touch_host(self, id: str, last_seen_ms: int) -> None:  # noqa: A002
        """Note that the host answered."""
        ...

    async def on_host(self, host_id: str) -> list[Environment]:
        """All live environments of a host."""
        ...

    async def acquire_host(self, id: str, claim: Claim) -> bool:  # noqa: A002
        """Take or prolong the right to watch a host."""
        ...


class Requests(Protocol):
    """Answers under an Idempotency-Key."""

    async def claim_request(self, key: RequestKey, keep_ms: int) -> StoredRequest | None:
        """None: the key is yours. Else what came before under it."""
        ...

    async def finish_request(self, key: RequestKey, status: int, body: str) -> None:
        """Keep the answer."""
        ...

    async def forget_request(self, key: RequestKey) -> None:
        """Free the key: nothing has happened."""
        ...


class Secrets(Protocol):
    """Sealed values."""

    async def put_secret(self, owner: str, name: str, sealed: str) -> None:
        """Save or replace."""
        ...

    async def get_secret(self, owner: str, name: str) -> str | None:
        """The sealed value."""
        ...


class Store(Records, Leases, Facts, Hosts, Requests, Secrets, Protocol):
    """Everything together, as the composition root opens it."""

    #: Id of the cluster, made with the database.
    cluster: str
    #: Called on the event loop with every committed record.
    listener: Callable[[Committed], None]

    async def ping(self) -> None:
        """Answer a trivial query. Raises Error."""
        ...

    async def world(self) -> World:
        """Everything at one moment, for `core.invariants`; without machines, which the store does not know."""
        ...

    async def purge(self, keep_ms: int, limit: int) -> int:
        """Delete ended environments older than that, their events, and expired keys. Returns how many environments."""
        ...

    async def close(self) -> None:
        """Finish what is queued and close."""
        ...
