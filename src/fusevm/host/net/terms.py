"""What the network grants one slot: its policy, and the ports of the host that lead to it.

Owns: the record. Must not: decide or apply.
"""

from collections.abc import Iterable

import msgspec

from fusevm.model.network import Network, PublishedPort, Transport


class Forward(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One port of the host that leads to a port of a machine."""

    protocol: Transport
    host_port: int
    port: int


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one slot that may change while it is in use."""

    policy: Network = Network()
    forwards: frozenset[Forward] = frozenset()

    @property
    def is_plain(self) -> bool:
        """Has it no policy of its own? Then it needs no element but its source."""
        return self.policy.internet and not self.policy.rules


#: Of a warm slot: nobody is in it yet.
DEFAULT_TERMS = Terms()


def make_terms(policy: Network, ports: Iterable[PublishedPort] = ()) -> Terms:
    """What a machine's record asks for."""
    forwards = (Forward(protocol=port.protocol, host_port=port.host_port, port=port.port) for port in ports)
    return Terms(policy=policy, forwards=frozenset(forwards))
