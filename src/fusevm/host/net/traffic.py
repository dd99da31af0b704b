"""What a machine has sent and received: bytes and packets from its veth, connections from the table's counters.

A veth counts from the moment it is made, which is before the machine gets it: of a warm slot that is next to nothing.
Counts begin anew with every start of the machine, as Prometheus expects of counters.

Owns: the reading. Must not: sum over machines.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from fusevm.host.net.listing import Counts
from fusevm.host.net.plan import NetworkPlan, parse_veth

_DEVICES = Path("/proc/net/dev")
#: Columns of proc_net_dev after the colon: received first, from the host's point of view.
_RX_BYTES, _RX_PACKETS, _TX_BYTES, _TX_PACKETS = 0, 1, 8, 9


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Of one machine, from its point of view."""

    received_bytes: int = 0
    received_packets: int = 0
    sent_bytes: int = 0
    sent_packets: int = 0
    #: Connections that it has opened, and that were opened to its published ports.
    connections_opened: int = 0
    connections_accepted: int = 0
    #: Packets that its policy did not let through.
    packets_refused: int = 0
    #: Questions for names that its policy does not allow.
    names_refused: int = 0


def observe_traffic(
    plan: NetworkPlan, counts: Mapping[int, Counts], refused_names: Mapping[int, int]
) -> dict[int, Traffic]:
    """Read the veths of slots that are in the table."""
    return parse_traffic(plan, _DEVICES.read_text(), counts, refused_names)


def parse_traffic(
    plan: NetworkPlan, devices: str, counts: Mapping[int, Counts], refused_names: Mapping[int, int]
) -> dict[int, Traffic]:
    """Read the text of /proc/net/dev (proc(5)), beside what the table has counted."""
    traffic: dict[int, Traffic] = {}
    for line in devices.splitlines():
        name, colon, numbers = line.partition(":")
        index = parse_veth(plan, name.strip())
        if not colon or index is None or index not in counts:
            continue
        values = [int(number) for number in numbers.split()]
        traffic[index] = Traffic(
            sent_bytes=values[_RX_BYTES],
            sent_packets=values[_RX_PACKETS],
            received_bytes=values[_TX_BYTES],
            received_packets=values[_TX_PACKETS],
            connections_opened=counts[index].opened,
            connections_accepted=counts[index].accepted,
            packets_refused=counts[index].refused,
            names_refused=refused_names.get(index, 0),
        )
    return traffic
