"""The page docs/states.md, made from the transition tables, so that picture and program cannot differ."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TypeVar

from fusevm.model import environment, machine
from fusevm.model.environment import State
from fusevm.model.machine import Phase

_S = TypeVar("_S", bound=StrEnum)

_STATES = {
    State.PROVISIONING: "Placed and booked; its boot is under way.",
    State.RUNNING: "The machine is up and its agent answered.",
    State.PAUSED: "The machine stands still and keeps its memory.",
    State.DRAINING: "Work is to end; nothing new is accepted. Ends by DELETE or when the linger limit is over.",
    State.DESTROYING: "Its end has begun and is repeated until the host confirms it.",
    State.DESTROYED: "Over as wanted: deleted, or a limit was reached.",
    State.FAILED: "Over because something broke: the boot, the machine or the host.",
}
_PHASES = {
    Phase.CREATING: "Disk, network and VMM are being made; the guest boots. The contract's API calls it `starting`.",
    Phase.RUNNING: "The guest agent answers.",
    Phase.PAUSED: "The virtual CPUs stand still.",
    Phase.STOPPED: "No VMM; the disk is kept.",
    Phase.FAILED: "The VMM ended by itself or never came up.",
    Phase.DELETING: "Everything of it is being removed; a tombstone stays.",
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
        "What the user sees. `destroyed` and `failed` are final; the straight way to `failed` is a lost host.",
        "",
        *_render(environment.ALLOWED, _STATES, State.PROVISIONING),
        "",
        "## Machine",
        "",
        "What the host daemon journals: one machine is one incarnation of an environment.",
        "",
        *_render(machine.ALLOWED, _PHASES, Phase.CREATING),
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
