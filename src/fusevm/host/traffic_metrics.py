"""What machines send and receive, in Prometheus' words: one series per machine and direction, gone with the machine.

Owns: names and help texts. Must not: measure.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from fusevm.host.net.traffic import Traffic


class TrafficCollector(Collector):
    """What was counted last."""

    def __init__(self) -> None:
        #: By machine.
        self.now: dict[str, Traffic] = {}

    def collect(self) -> Iterator[Metric]:
        """Every machine that has a network slot."""
        both, one = ["machine", "direction"], ["machine"]
        octets = CounterMetricFamily("fuse_host_machine_network_bytes", "Bytes to (in) and from (out) it", labels=both)
        packets = CounterMetricFamily("fuse_host_machine_network_packets", "Packets, likewise", labels=both)
        opened = CounterMetricFamily(
            "fuse_host_machine_connections",
            "Connections to its published ports (in) and opened by it (out)",
            labels=both,
        )
        refused = CounterMetricFamily(
            "fuse_host_machine_packets_refused", "Its packets that its policy did not let through", labels=one
        )
        names = CounterMetricFamily(
            "fuse_host_machine_names_refused", "Its questions for names that its policy does not allow", labels=one
        )
        for machine, traffic in sorted(self.now.items()):
            octets.add_metric([machine, "in"], traffic.received_bytes)
            octets.add_metric([machine, "out"], traffic.sent_bytes)
            packets.add_metric([machine, "in"], traffic.received_packets)
            packets.add_metric([machine, "out"], traffic.sent_packets)
            opened.add_metric([machine, "in"], traffic.connections_accepted)
            opened.add_metric([machine, "out"], traffic.connections_opened)
            refused.add_metric([machine], traffic.packets_refused)
            names.add_metric([machine], traffic.names_refused)
        yield from (octets, packets, opened, refused, names)
