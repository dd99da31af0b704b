"""The page docs/states.md, made from the transition tables, so that picture and program cannot differ."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TypeVar

from fusevm.model import environment, machine, snapshot
from fusevm.model.environment import State
from fusevm.model.machine import Phase
from fusevm.model.snapshot import SnapshotState

_S = TypeVar("_S", bound=StrEnum)

_STATES = {
    State.PROVISIONING: "It waits for a place, boots, or is set up: files, startup script, daemon.",
    State.RUNNING: "The machine is up and set up. At most one of these is under way: new token, snapshot, restore.",
    State.PAUSED: "The machine stands still and keeps its memory.",
    State.DRAINING: "Nothing new is accepted, the daemon is asked to end. Over by DELETE or when the linger limit is.",
    State.DESTROYING: "Its end has begun and is repeated until the host confirms it.",
    State.DESTROYED: "Over as wanted: deleted, or a limit was reached.",
    State.FAILED: "Over because something broke or ran out: the place, the boot, the setup, the machine or the host.",
}
_PHASES = {
    Phase.CREATING: "Disk, network and VMM are being made; the guest boots. The contract's API calls it `starting`.",
    Phase.RUNNING: "The guest agent answers.",
    Phase.PAUSED: "The virtual CPUs stand still.",
    Phase.STOPPED: "No VMM; the disk is kept.",
    Phase.FAILED: "The VMM ended by itself or never came up.",
    Phase.DELETING: "Everything of it is being removed; a tombstone stays.",
}
_SNAPSHOTS = {
    SnapshotState.CREATING: "Being taken by the pending action of its environment; cannot be deleted meanwhile.",
    SnapshotState.READY: "Can be restored, and new environments can start from it.",
    SnapshotState.RESTORING: "Its environment's machine is being put back to it; cannot be deleted meanwhile.",
    SnapshotState.DELETING: "Its bytes are being freed; the record goes when they are.",
    SnapshotState.ERROR: "Could not be taken; only good for deletion. `last_error` says why.",
}


def render_states() -> str:
    """The whole page as Markdown with Mermaid diagrams."""
    lines = [
        "# States",
        "",
        "Generated from the `ALLOWED` tables in `fusevm.model`: a transition that is not drawn here does not happen.",
        "Do not edit; `fusevm.core.diagram` writes this page, and a test compares it.",
        "",
        "## Environment",
        "",
        "What the user sees. `destroyed` and `failed` are final. The straight ways there: while it waits for a place,",
        "since no machine was ever made; and from anywhere to `failed` when the host is lost.",
        "",
        *_render(environment.ALLOWED, _STATES, State.PROVISIONING),
        "",
        "## Machine",
        "",
        "What the host daemon journals: one machine is one incarnation of an environment.",
        "",
        *_render(machine.ALLOWED, _PHASES, Phase.CREATING),
        "",
        "## Snapshot",
        "",
        "A snapshot that fails to be restored is `ready` again: the failure says nothing about its bytes.",
        "",
        *_render(snapshot.ALLOWED, _SNAPSHOTS, SnapshotState.CREATING),
    ]
    return "\n".join(lines) + "\n"


def _render(allowed: Mapping[_S, frozenset[_S]], meaning: Mapping[_S, str], first: _S) -> Iterator[str]:
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {first}"
    for state, following in allowed.items():
        yield from (f"    {state} --> {target}" for target in sorted(following))
        if not following:
            yield f"    {state} --> [*]"
    yield "```"
    yield ""
    yield "| name | meaning |"
    yield "|---|---|"
    for state in allowed:
        yield f"| `{state}` | {meaning[state]} |"
