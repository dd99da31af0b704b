"""Published ports of machines that are only pretended: numbers that a real host would give, and nobody behind them."""

from fusevm.wire.host_api import CreateMachine, PublishedPortBody

_FIRST_PORT = 20_000


def pretended_ports(body: CreateMachine) -> list[PublishedPortBody]:
    """What a host would answer to a create that exposes ports."""
    return [
        PublishedPortBody(
            id=f"{body.machine_id}-{exposure.protocol}-{exposure.port}",
            machine_id=body.machine_id,
            name=exposure.name,
            port=exposure.port,
            host_port=exposure.host_port or _FIRST_PORT + number,
            protocol=exposure.protocol,
            created_at="1970-01-01T00:00:00Z",
        )
        for number, exposure in enumerate(body.spec.expose)
    ]
