"""Machines that come and go many times at once; and everything that a host has, before and after."""

import asyncio

from real_host import BOOT_MS, Host, make_fence


def census(host: Host) -> dict[str, list[str]]:
    """All that there is in the host's box, and in its directories, of whatever kind, by name."""
    run = host.box.run
    return {
        "processes": sorted(run("ps", "-ww", "-eo", "args=").splitlines()),
        "links": sorted(line.partition(": ")[2] for line in run("ip", "-o", "link", "show").splitlines()),
        "addresses": sorted(run("ip", "-o", "address", "show").splitlines()),
        "routes": sorted(run("ip", "route", "show", "table", "all").splitlines()),
        "namespaces": sorted(run("ip", "netns", "list").split()),
        "rules": run("nft", "-s", "list", "ruleset").splitlines(),
        "mounts": sorted(run("cat", "/proc/self/mounts").splitlines()),
        "groups": sorted(host.group_names()),
        "folders": sorted(str(path) for root in (host.data / "machines", host.run_dir) for path in root.rglob("*")),
        "listening": sorted(run("sh", "-c", "tail -n +2 /proc/net/udp /proc/net/tcp | cut -c1-40").splitlines()),
    }


async def churn(host: Host, numbers: range, batch: int, **spec: object) -> None:
    """Create and delete so many machines, a batch of them at the same time."""

    async def live(number: int) -> None:
        fence = make_fence(f"u{number}")
        machine = await host.create(f"m-{number}", fence, BOOT_MS, **spec)
        assert machine.phase == "running"
        await host.delete(f"m-{number}", make_fence(f"u{number}", action_seq=2))

    for first in range(0, len(numbers), batch):
        async with asyncio.TaskGroup() as group:
            for number in numbers[first : first + batch]:
                group.create_task(live(number))
