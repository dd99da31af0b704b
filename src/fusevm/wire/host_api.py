"""Bodies and headers of the machine API, spoken by the control plane to the host daemon.

Every order carries its fence in four headers and, in a fifth, until when it is valid by the host's clock, of which
`GET /info` gives a reading (`fence_headers`, docs/decisions/0016-deadlines-of-orders.md). Errors are flat
(`wire.errors`). Paths below `/machines/{id}/guest/` are relayed to the guest agent unchanged
(docs/guest-protocol.md); a WebSocket at `/machines/{id}/guest/exec` carries exec frames.
"""

from collections.abc import Mapping

import msgspec

from fusevm.model.environment import Timings
from fusevm.model.errors import BadField
from fusevm.model.host import Resources
from fusevm.model.machine import Fence, Isolation, MachineSpec, Moment, Phase
from fusevm.model.network import Network, Transport
from fusevm.wire.contract import ArtifactBody, PortBody
from fusevm.wire.errors import FlatError
from fusevm.wire.guest import StreamFlags

CLUSTER_HEADER = "fuse-cluster"
UID_HEADER = "fuse-uid"
INCARNATION_HEADER = "fuse-incarnation"
ACTION_SEQ_HEADER = "fuse-action-seq"
#: `<clock> <milliseconds>`; not there: no limit.
VALID_UNTIL_HEADER = "fuse-valid-until"
#: Of any number in a header: what fits into 64 bits.
MAX_DIGITS = 18


def fence_headers(fence: Fence) -> dict[str, str]:
    """The headers of an order."""
    headers = {
        CLUSTER_HEADER: fence.cluster,
        UID_HEADER: fence.uid,
        INCARNATION_HEADER: str(fence.incarnation),
        ACTION_SEQ_HEADER: str(fence.action_seq),
    }
    if fence.valid_until is not None:
        headers[VALID_UNTIL_HEADER] = f"{fence.valid_until.clock} {fence.valid_until.ms}"
    return headers


def parse_fence(headers: Mapping[str, str]) -> Fence | None:
    """The fence of an order, or None when none of its headers is there. Raises BadField for a partial or bad one."""
    names = (CLUSTER_HEADER, UID_HEADER, INCARNATION_HEADER, ACTION_SEQ_HEADER)
    values = [headers.get(name) for name in names]
    until = headers.get(VALID_UNTIL_HEADER)
    if until is None and all(value is None for value in values):
        return None
    cluster, uid, incarnation, action_seq = values
    if not cluster or not uid or not _is_number(incarnation or "") or not _is_number(action_seq or ""):
        raise BadField(field="fence", problem=f"the headers {', '.join(names)} belong together")
    return Fence(
        cluster=cluster,
        uid=uid,
        incarnation=int(incarnation or 0),
        action_seq=int(action_seq or 0),
        valid_until=None if until is None else _parse_moment(until),
    )


def _parse_moment(text: str) -> Moment:
    clock, _, ms = text.rpartition(" ")
    if not clock or not _is_number(ms.removeprefix("-")):
        raise BadField(field="fence", problem=f"{VALID_UNTIL_HEADER} must be the name of a clock and milliseconds")
    return Moment(clock=clock, ms=int(ms))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS


class CreateMachine(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /machines`. Synchronous: the answer comes when the guest agent is configured."""

    machine_id: str
    spec: MachineSpec
    #: How long the caller is willing to wait for the agent.
    boot_timeout_ms: int = 60_000
    #: A snapshot of this host whose disk the machine starts from; empty: the image alone.
    snapshot_id: str = ""


class QuarantineBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something with the machine has failed and is tried again by itself; other machines are not affected."""

    #: RFC 3339.
    since: str
    attempts: int
    #: Of the last attempt, for people.
    problem: str
    #: RFC 3339; empty: only an order (to delete it) helps.
    retry_at: str = ""


class PublishPort(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /machines/{id}/published-ports`. Idempotent by `published_port_id`."""

    published_port_id: str
    port: int
    protocol: Transport = Transport.TCP
    name: str = ""
    #: Wanted on the host; 0: the first free one of its range.
    host_port: int = 0


class PublishedPortBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A port of a machine that its host forwards."""

    id: str = msgspec.field()
    machine_id: str
    name: str = ""
    port: int = msgspec.field()
    host_port: int
    protocol: Transport
    #: RFC 3339.
    created_at: str


class PublishedPortAnswer(msgspec.Struct, frozen=True, kw_only=True):
    port: PublishedPortBody


class PublishedPortList(msgspec.Struct, frozen=True, kw_only=True):
    ports: list[PublishedPortBody] = []


class TrafficBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine has sent and received since its start, from its point of view."""

    received_bytes: int = 0
    received_packets: int = 0
    sent_bytes: int = 0
    sent_packets: int = 0
    connections_opened: int = 0
    #: To its published ports.
    connections_accepted: int = 0
    #: By its policy.
    packets_refused: int = 0
    names_refused: int = 0


class NetworkAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's policy as it is in force; `traffic` is null while it has no network slot."""

    network: Network
    traffic: TrafficBody | None = None


class MachineBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A machine as the API shows it. `phase` is `starting` for `creating` in one of the contract's users."""

    id: str
    cluster: str = ""
    uid: str = ""
    incarnation: int = 0
    phase: Phase
    spec: MachineSpec
    image_digest: str = ""
    driver: str = ""
    isolation: Isolation = Isolation.NAMESPACE
    address: str = ""
    generation: int = 0
    timings: Timings = Timings()
    error: str = ""
    #: RFC 3339.
    created_at: str
    started_at: str = ""
    published_ports: list[PublishedPortBody] = []
    #: Seconds since a client last sent something to one of its published ports. Only there if one has since its start
    #: and the host keeps such times; 0 while it cannot read them. After a restart of the daemon it may be the time of
    #: the machine that had its network slot before, which is longer than its own life. In the list and in `GET`.
    ports_used_s_ago: int | None = None
    #: Only there while something is wrong.
    quarantine: QuarantineBody | None = None
    # What follows is the contract's, and only there in machines that were made in its form.
    artifact: ArtifactBody | None = None
    system_volume_id: str = ""
    user_volume_ids: list[str] = []
    runtime_host: str = ""
    ports: list[PortBody] = []
    guest_ssh_host_public_key: str = ""


class MachineAnswer(msgspec.Struct, frozen=True, kw_only=True):
    machine: MachineBody


class MachineList(msgspec.Struct, frozen=True, kw_only=True):
    machines: list[MachineBody] = []
    #: Fences of deleted machines that are still kept.
    tombstones: int = 0


class ImageRun(msgspec.Struct, frozen=True, kw_only=True):
    """How commands run in machines of an image, unless they say otherwise."""

    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = "root"
    entrypoint: list[str] = []
    cmd: list[str] = []


class ImageBody(msgspec.Struct, frozen=True, kw_only=True):
    """An image as the API shows it."""

    digest: str
    names: list[str] = []
    size_bytes: int = 0
    architecture: str = ""
    #: `built`, `pulled` or `artifact`.
    origin: str = ""
    #: Reference, file, URL or recipe that it came from.
    source: str = ""
    #: Of the manifest in the registry that it came from.
    manifest_digest: str = ""
    config: ImageRun = ImageRun()
    #: What needs it: `machine m-1`.
    users: list[str] = []
    created_at: str = ""


class ImageList(msgspec.Struct, frozen=True, kw_only=True):
    images: list[ImageBody] = []


class AmountBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a host gives out of one thing, ratios and reserves included, and what of it is booked."""

    limit: int = 0
    booked: int = 0


class PlaceBody(msgspec.Struct, frozen=True, kw_only=True):
    """A file system that machines take from; creates are refused while it `is_low`."""

    path: str
    holds: str = ""
    free_bytes: int = 0
    reserve_bytes: int = 0
    #: Both 0 where the file system does not count them.
    free_inodes: int = 0
    reserve_inodes: int = 0
    is_low: bool = False


class AdmissionBody(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers that a create is measured by: it is refused (`host_full`) when one limit would be exceeded."""

    cpus: AmountBody = AmountBody()
    #: Booked: with `overhead_mib` for each machine that runs.
    memory_mib: AmountBody = AmountBody()
    disk_bytes: AmountBody = AmountBody()
    machines: AmountBody = AmountBody()
    #: What a VMM takes beside its guest's memory.
    overhead_mib: int = 0
    places: list[PlaceBody] = []


class PullImage(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /images/pull`. Idempotent: an image that is here already is only named."""

    #: `debian:12`, `registry.example/team/tool@sha256:...`
    reference: str
    #: Name on this host; empty: the reference's own.
    name: str = ""
    #: A file of credentials as `skopeo login` writes it.
    credentials_b64: str = ""
    #: The registry speaks HTTP without TLS. One on loopback may without being asked.
    plain_http: bool = False


class PullLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line (JSON) of the answer to `POST /images/pull`: a step, and in the last line the image or the failure."""

    step: str = ""
    done_bytes: int | None = None
    total_bytes: int | None = None
    detail: str = ""
    image: ImageBody | None = None
    failure: FlatError | None = None


class CollectImages(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /images/collect`."""

    #: Also those that have a name.
    all: bool = False


class CollectedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was removed, or with 0 bytes: only a name of it."""

    digest: str
    names: list[str] = []
    freed_bytes: int = 0


class CollectedImages(msgspec.Struct, frozen=True, kw_only=True):
    removed: list[CollectedImage] = []


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /info`: what this host is and can take."""

    version: str
    #: Changes with every start of the daemon.
    epoch: str
    #: Now, by the clock that limits of orders go by.
    clock: Moment
    cluster: str = ""
    arch: str = "amd64"
    driver: str = ""
    #: Why this driver, for people.
    driver_reason: str = ""
    isolation: Isolation = Isolation.NAMESPACE
    capacity: Resources
    reserved: Resources = Resources()
    admission: AdmissionBody = AdmissionBody()
    images: list[str] = []
    agent_version: str = ""
    kernel: str = ""
    #: Of the program that runs machines, as it says itself.
    vmm_version: str = ""


class MachineEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line (JSON) of `GET /events`: a machine changed its phase. The first line of a stream is `hello`."""

    kind: str
    epoch: str = ""
    machine_id: str = ""
    uid: str = ""
    incarnation: int = 0
    phase: str = ""
    error: str = ""
    at_ms: int = 0


class HostExec(msgspec.Struct, frozen=True, kw_only=True):
    """Body of the contract's `POST /machines/{id}/exec`."""

    command: list[str]
    cwd: str = ""
    env: dict[str, str] = {}
    #: Default 30 s, cap 300 s.
    timeout_ms: int = 30_000
    user: str = ""


class HostExecAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Strings are lossy UTF-8, as the contract has them. What they cannot say follows, only where there is any."""

    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    #: The bytes of a stream that is no UTF-8.
    stdout_b64: str | msgspec.UnsetType = msgspec.UNSET
    stderr_b64: str | msgspec.UnsetType = msgspec.UNSET
    #: Streams of which the end is missing.
    truncated: StreamFlags | msgspec.UnsetType = msgspec.UNSET
    #: The command was killed at its time limit.
    timed_out: bool | msgspec.UnsetType = msgspec.UNSET


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /health`: the daemon serves."""

    ok: bool = True


class StoragePool(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of thing takes of the disk."""

    pool: str
    bytes: int = 0


class MachineStorage(msgspec.Struct, frozen=True, kw_only=True):
    """What one machine takes: its disk, nothing (there are no volumes of users), its console and sockets."""

    machine_id: str
    system_bytes: int = 0
    user_bytes: int = 0
    runtime_bytes: int = 0


class SnapshotStorage(msgspec.Struct, frozen=True, kw_only=True):
    snapshot_id: str
    bytes: int = 0


class StorageReport(msgspec.Struct, frozen=True, kw_only=True):
    """Allocated blocks, not apparent sizes: sparse files count what they really take."""

    #: RFC 3339.
    generated_at: str
    total_bytes: int = 0
    pools: list[StoragePool] = []
    machines: list[MachineStorage] = []
    snapshots: list[SnapshotStorage] = []
    published_ports: int = 0


class StorageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    report: StorageReport
