"""Machines in the contract's words beside Fuse's own. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from fusevm.host.contract.relays import render_ports
from fusevm.host.quarantine import Quarantine
from fusevm.host.render import render_machine
from fusevm.model.machine import Machine, Phase

#: What the contract calls a machine that is being made or started. The other phases have the same names, and `paused`
#: and `deleting` are ours alone.
STARTING = "starting"


def render_body(
    machine: Machine, quarantine: Quarantine | None = None, ports_used_s_ago: int | None = None
) -> dict[str, Any]:
    """A machine as the API shows it: those of the contract's users in their words, with Fuse's fields beside."""
    body: dict[str, Any] = msgspec.to_builtins(render_machine(machine, quarantine, ports_used_s_ago))
    contract = machine.contract
    if contract is None:
        return body
    if machine.phase is Phase.CREATING:
        body["phase"] = STARTING
    if contract.artifact is not None:
        body["artifact"] = msgspec.to_builtins(contract.artifact)
    body["system_volume_id"] = f"{machine.id}-system"
    if machine.address:
        body["runtime_host"] = machine.address
    body["guest_ssh_host_public_key"] = contract.login.host_public_key
    if machine.phase is Phase.RUNNING:
        body["ports"] = [msgspec.to_builtins(port) for port in render_ports(machine)]
    return body
