"""What the control plane needs of a store, grouped by who asks. Nothing else about a database is known outside.

Rules every store keeps:
- A write is one transaction; when the call returns, it is durable. A cancelled call may still have been carried out.
- `commit` is a compare-and-swap on `revision`, refuses transitions that are not in the table, saves record, facts and
  pending action together, and gives up the placement with the terminal state.
- Leases end by database time. A lease is about one action: a commit that replaces the action ends it.
- Every committed record is shown to the listener, also when the caller was cancelled meanwhile.
- A list leaves out a record that cannot be read, and says so; whoever asks for that one alone gets the error.
- Where several replicas share a database, the waker of each hears what the others commit. It is only a hint to look
  again: it may come late, doubled, or, while the database is away, not at all; then `EVERYTHING` follows.
"""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from fusevm.core.invariants import World
from fusevm.core.lifecycle import Step
from fusevm.model.api_key import ApiKey
from fusevm.model.environment import Environment
from fusevm.model.fact import Fact
from fusevm.model.host import Host, Resources
from fusevm.model.snapshot import Snapshot

T = TypeVar("T")


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


class SealedRow(msgspec.Struct, frozen=True):
    """A sealed value that is saved in the same transaction as what it belongs to."""

    owner: str
    name: str
    sealed: str


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
    #: None: of all tenants.
    tenant: str | None = None
    ended: bool = False
    #: uid of the last one of the page before.
    after: str = ""
    limit: int = 50


class Reading(msgspec.Struct, Generic[T], frozen=True):
    """Records as a list has them, and those that it leaves out."""

    records: tuple[T, ...] = ()
    #: Ids of records that are there, but damaged, or of a newer program.
    unreadable: frozenset[str] = frozenset()


class SnapshotQuery(msgspec.Struct, frozen=True, kw_only=True):
    """One page of snapshots, newest first."""

    uid: str = ""
    #: Task of the environment, as its record has it.
    task_id: str = ""
    tenant: str | None = None
    state: str = ""
    host_id: str = ""
    mode: str = ""
    name: str = ""
    layer_key: str = ""
    arch: str = ""
    #: id of the last one of the page before.
    after: str = ""
    limit: int = 50


class Due(msgspec.Struct, frozen=True):
    """What waits for a worker: pending actions that nobody holds, deadlines that have passed, and snapshots that are to
    be deleted (by request, or because they are expired) and that nobody is at."""

    actions: tuple[tuple[str, int], ...] = ()
    deadlines: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()


#: A place in the global order of facts: (transaction, number). `START` is before all.
Position = tuple[int, int]
START: Position = (0, 0)

#: What a waker is told instead of a uid: `facts_after` shows more than before; or: changes may have been missed.
GLOBAL_ORDER = ""
EVERYTHING = "*"


class StoredFact(msgspec.Struct, frozen=True):
    """A fact with its place in the global order."""

    position: Position
    task_id: str
    tenant: str
    fact: Fact


class RequestKey(msgspec.Struct, frozen=True):
    """An Idempotency-Key in its scope, what the request was, and which of the equal requests this is."""

    tenant: str
    route: str
    key: str
    #: SHA-256 of what was asked.
    fingerprint: str
    #: Unique to one request: only who holds the claim may bind, finish or forget the key.
    claimant: str

    @property
    def row(self) -> str:
        """What a sealed answer is bound to."""
        return f"request:{self.tenant}:{self.route}/{self.key}"


class StoredRequest(msgspec.Struct, frozen=True):
    """What is known of a request that came before. `status` 0: no answer yet. `uid`: what it made, if that is bound."""

    fingerprint: str
    uid: str
    status: int
    body: str
    is_sealed: bool


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted, for people who watch from afar. Its parts may be of different moments."""

    #: State to number of live environments.
    live: dict[str, int]
    #: Environments that wait for a place, and when the first of them began to.
    queued: int
    queued_since_ms: int | None
    #: (Host, state) to number and bytes of snapshots.
    snapshots: dict[tuple[str, str], tuple[int, int]]


class Records(Protocol):
    """Environments."""

    async def create(
        self,
        step: Step,
        reservation: Reservation | None,
        claim: Claim | None,
        key: RequestKey | None = None,
        sealed: SealedRow | None = None,
    ) -> Environment:
        """Insert a new environment, book its place, bind the request key and keep its setup, or do none of it.

        Without a reservation it waits for a place. Raises TaskExists, ReservationLost, StoreFull, and
        IdempotencyInProgress when the key is no longer the claimant's.
        """
        ...

    async def commit(
        self,
        uid: str,
        revision: int,
        step: Step,
        claim: Claim | None,
        *,
        reservation: Reservation | None = None,
        sealed: SealedRow | None = None,
    ) -> Environment:
        """Save what an event led to, the snapshots in `step` included; the answer carries the new revision.

        A new pending action is leased to `claim`; an unchanged one keeps its lease. A reservation is booked for a
        record that had no host. The terminal state deletes the sealed rows of the environment (owner `env:<uid>`).
        Snapshots: where a restore begins, it must be the revision that was read; the end of an action is taken in any
        case, but a snapshot that is gone stays so. Raises RevisionConflict, ReservationLost, StoreFull, and Internal
        for a transition that a table forbids.
        """
        ...

    async def queued(self, limit: int) -> list[Environment]:
        """Environments that wait for a place, in turns: the oldest of every tenant by age, then the second oldest."""
        ...

    async def queued_after(self, uid: str, limit: int) -> list[Environment]:
        """Environments that wait for a place, of any tenant, by uid, which is by age."""
        ...

    async def usage_by_tenant(self) -> dict[str, Resources]:
        """What is placed, per tenant that has anything placed."""
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

    async def now_ms(self) -> int:
        """The time by which leases end: the database's."""
        ...

    async def due(self, limit: int) -> Due:
        """What waits for a worker now, oldest first."""
        ...

    async def acquire(self, uid: str, seq: int, claim: Claim) -> Environment | None:
        """Take the pending action if it is still this one and nobody holds it."""
        ...

    async def renew(self, held: Sequence[tuple[str, int]], claim: Claim) -> set[tuple[str, int]]:
        """Prolong leases; the answer says which are still held."""
        ...

    async def release(self, owner: str) -> None:
        """Give all leases of the owner back, those on hosts and snapshots too."""
        ...


class Facts(Protocol):
    """The numbered events."""

    async def facts_of(self, uid: str, after_seq: int, limit: int) -> list[StoredFact]:
        """Facts of one environment with a higher number, as far as they are kept."""
        ...

    async def facts_after(self, position: Position, limit: int, tenant: str | None = None) -> list[StoredFact]:
        """Facts of all environments (of one tenant) in global order. None is ever inserted before one that was read:
        facts of transactions that may still be joined by older ones are not shown yet."""
        ...

    async def position_of(self, uid: str, seq: int) -> Position | None:
        """Place of a fact in the global order; None when it is not kept."""
        ...

    async def last_position(self) -> Position:
        """Place of the newest fact that `facts_after` shows; START: there is none."""
        ...


class Hosts(Protocol):
    """Hosts; `allocated` is kept by `create` and `commit`."""

    async def hosts(self) -> list[Host]:
        """All hosts by id."""
        ...

    async def has_hosts(self) -> bool:
        """Is any host known? One whose record cannot be read counts."""
        ...

    async def host_page(self, after: str, limit: int) -> list[Host]:
        """The hosts that follow an id, by id."""
        ...

    async def host(self, id: str) -> Host | None:  # noqa: A002 - the record's field
        """One host."""
        ...

    async def save_host(self, host: Host, sealed: SealedRow | None = None) -> Host:
        """Insert (revision 0) or replace by compare-and-swap, with its token; `allocated` is ignored.

        Raises RevisionConflict.
        """
        ...

    async def touch_host(self, id: str, last_seen_ms: int) -> None:  # noqa: A002
        """Note that the host answered."""
        ...

    async def on_host(self, host_id: str) -> Reading[Environment]:
        """All live environments of a host."""
        ...

    async def drop_host(self, id: str, revision: int | None = None) -> None:  # noqa: A002
        """Delete a host without placements, with its sealed values (owner `host:<id>`); its ready snapshots cannot be
        used any more. `revision`: only this one. Raises HostInUse, HostNotFound, RevisionConflict."""
        ...

    async def acquire_host(self, id: str, claim: Claim) -> bool:  # noqa: A002
        """Take or prolong the right to watch a host."""
        ...


class Snapshots(Protocol):
    """Snapshots. Those of an environment's action are saved by `commit`."""

    async def snapshot(self, id: str) -> Snapshot | None:  # noqa: A002
        """One snapshot."""
        ...

    async def snapshots(self, query: SnapshotQuery) -> list[Snapshot]:
        """At most `query.limit` records."""
        ...

    async def save_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Replace by compare-and-swap on `revision`. Raises RevisionConflict, and Internal for a forbidden change."""
        ...

    async def acquire_snapshot(self, id: str, claim: Claim) -> Snapshot | None:  # noqa: A002
        """Take the deletion of a snapshot if it is due and nobody is at it; an expired one becomes `deleting`."""
        ...

    async def drop_snapshot(self, id: str) -> None:  # noqa: A002
        """Forget a snapshot whose bytes are gone. Idempotent."""
        ...


class Keys(Protocol):
    """API keys."""

    async def add_key(self, key: ApiKey) -> None:
        """Save a new key. Raises RevisionConflict when its id or public part is taken."""
        ...

    async def find_key(self, prefix: str) -> ApiKey | None:
        """The key with this public part, revoked and expired ones included."""
        ...

    async def keys(self) -> list[ApiKey]:
        """All keys, newest first."""
        ...

    async def revoke_key(self, id: str, now_ms: int) -> bool:  # noqa: A002
        """False: there is no such key. Idempotent."""
        ...

    async def touch_key(self, id: str, now_ms: int) -> None:  # noqa: A002
        """Note its use."""
        ...


class Requests(Protocol):
    """Answers under an Idempotency-Key."""

    async def claim_request(
        self, key: RequestKey, keep_ms: int, dead_after_ms: int | None = None
    ) -> StoredRequest | None:
        """None: the key is yours. Else what came before under it. Idempotent for one claimant.

        A claim for the same that has bound nothing for `dead_after_ms` is taken over.
        """
        ...

    async def finish_request(
        self, key: RequestKey, status: int, body: str, *, is_sealed: bool = False, uid: str = ""
    ) -> None:
        """Keep the answer, the first one; also of a request that only waited for `uid`, to which the key is bound."""
        ...

    async def forget_request(self, key: RequestKey) -> str:
        """Free the key if it is the claimant's and bound to nothing; else what its request made, or empty.

        Exact also while the answer to the commit that binds it is lost: it waits for that transaction's end.
        """
        ...


class Secrets(Protocol):
    """Sealed values."""

    async def put_secret(self, owner: str, name: str, sealed: str) -> None:
        """Save or replace."""
        ...

    async def get_secret(self, owner: str, name: str) -> str | None:
        """The sealed value."""
        ...

    async def reseal_secret(self, owner: str, name: str, old: str, new: str) -> None:
        """Replace a sealed value if it is still `old`; a dropped one does not come back."""
        ...

    async def secrets_sealed_otherwise(self, mark: str, after: tuple[str, str], limit: int) -> list[SealedRow]:
        """Values that do not begin with `mark`, in the order of (owner, name), behind `after`."""
        ...


class Store(Records, Leases, Facts, Hosts, Snapshots, Keys, Requests, Secrets, Protocol):
    """Everything together, as the composition root opens it."""

    #: Id of the cluster, made with the database.
    cluster: str
    #: Called on the event loop with every record that this replica committed.
    listener: Callable[[Committed], None]
    #: Called on the event loop with the uid of a record that another replica committed, with `GLOBAL_ORDER` or with
    #: `EVERYTHING`. SQLite, which belongs to one process, never calls it.
    waker: Callable[[str], None]
    #: Called on the event loop with the ids that a list has left out (environments, hosts, snapshots; events as
    #: `<uid>.<seq>`): their records cannot be read.
    doubter: Callable[[frozenset[str]], None]

    async def ping(self) -> None:
        """Answer a trivial query. Raises Error."""
        ...

    async def tally(self) -> Tally:
        """Counts of everything; cheap enough to be asked for by every scrape."""
        ...

    async def world(self) -> World:
        """Everything at one moment, for `core.invariants`; without machines, which the store does not know."""
        ...

    async def purge(self, keep_ms: int, limit: int) -> int:
        """Delete ended environments older than that, with their events, and expired request keys; the number of
        environments. Those that still have snapshots stay."""
        ...

    async def prune_events(self, keep_ms: int, limit: int) -> int:
        """Delete about `limit` of the events older than that; the number of deleted ones.

        What is kept of an environment is always a run up to its last event, which stays as long as its record.
        """
        ...

    async def close(self) -> None:
        """Finish what is queued and close."""
        ...
