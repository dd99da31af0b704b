"""Times the life of network slots, in a network namespace of its own: `python bench/network.py [--runs N]` as root.

Medians in milliseconds. Creation is without a warm pool; acquire is of a warm slot with the default policy; release is
the call, `destroyed` the background work until nothing is left of the slot. `raw_nft` adds one element to a set by the
program `nft`, `raw_library` by its library: what an acquire with terms of its own costs at least. Nothing outside the
namespaces is touched.
"""

import argparse
import asyncio
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

_INSIDE = "FUSE_BENCH_PRIVATE_NETWORK"
_PREPARE = 'mkdir -p /run/netns && mount -t tmpfs fuse-bench /run/netns && ip link set lo up && exec "$@"'
_BATCH = 8


async def timed(samples: list[float], work: Callable[[], Awaitable[object]]) -> None:
    start = time.perf_counter()
    await work()
    samples.append((time.perf_counter() - start) * 1000)


async def measure(runs: int) -> dict[str, list[float]]:
    # Imported here: the outer process only starts the inner one.
    from fusevm.host.net.network import HostNetwork  # noqa: PLC0415
    from fusevm.host.net.nft import Table  # noqa: PLC0415
    from fusevm.host.net.plan import NetworkPlan  # noqa: PLC0415
    from fusevm.host.net.tap import open_tap  # noqa: PLC0415
    from fusevm.host.net.terms import Terms  # noqa: PLC0415
    from fusevm.host.net.transaction import apply_transaction  # noqa: PLC0415
    from fusevm.model.network import Network  # noqa: PLC0415

    names = ["create", "create_in_batch_each", "acquire_warm", "acquire_warm_offline", "raw_nft", "raw_library"]
    names += ["set_terms", "open_tap", "serve_dns", "release", "destroyed", "ensure"]
    samples: dict[str, list[float]] = {name: [] for name in names}
    plan = NetworkPlan(prefix="fb", range="10.211.0.0/16")

    cold = HostNetwork(plan, warm=0)
    await cold.open({})
    for _ in range(runs):
        await timed(samples["create"], lambda: cold.acquire(0))
        await timed(samples["release"], lambda: cold.release(0))
        await timed(samples["destroyed"], cold.settle)
    for _ in range(max(runs // _BATCH, 3)):
        start = time.perf_counter()
        await asyncio.gather(*(cold.acquire(index) for index in range(_BATCH)))
        samples["create_in_batch_each"].append((time.perf_counter() - start) * 1000 / _BATCH)
        for index in range(_BATCH):
            await cold.release(index)
        await cold.settle()
    await cold.close()

    warm = HostNetwork(plan, warm=_BATCH)
    await warm.open({})
    offline = Terms(policy=Network(internet=False))
    numbers = itertools.cycle(range(250))
    raw = Table("inet", "raw")
    await apply_transaction([*raw.replace(), raw.set("seen", "ipv4_addr")])
    for _ in range(runs):
        await warm.settle()
        first, second, third = itertools.islice(warm.candidates(), 3)
        await timed(samples["acquire_warm"], functools.partial(warm.acquire, first))
        slot = await warm.acquire(second)
        await warm.settle()
        await timed(samples["open_tap"], lambda slot=slot: close_tap(open_tap(slot.namespace_path, slot.tap)))
        await timed(samples["serve_dns"], functools.partial(warm.serve_dns, slot))
        await timed(samples["set_terms"], functools.partial(warm.set_terms, slot, offline))
        await timed(samples["acquire_warm_offline"], functools.partial(warm.acquire, third, offline))
        await timed(samples["raw_nft"], functools.partial(add_by_program, numbers))
        element = [f"192.0.2.{next(numbers)}"]
        await timed(samples["raw_library"], functools.partial(apply_transaction, raw.add_elements("seen", element)))
        await warm.settle()
        await timed(samples["ensure"], warm.ensure)
        for index in (first, second, third):
            await warm.release(index)
    await warm.close()
    await warm.sweep(set())
    return samples


async def add_by_program(numbers: Iterator[int]) -> None:
    argv = ["nft", f"add element inet raw seen {{ 198.51.100.{next(numbers)} }}"]
    process = await asyncio.create_subprocess_exec(*argv)
    await process.wait()


async def close_tap(opening: Awaitable[int]) -> None:
    os.close(await opening)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--raw", type=Path, help="write all samples here as JSON")
    options = parser.parse_args()
    if os.environ.get(_INSIDE) != "1":
        unshare = ["unshare", "--net", "--mount", "--propagation=private", "--pid", "--fork", "--mount-proc"]
        argv = [*unshare, "sh", "-c", _PREPARE, "bench", sys.executable, *sys.argv]
        sys.exit(subprocess.run(argv, check=False, env={**os.environ, _INSIDE: "1"}).returncode)
    samples = asyncio.run(measure(options.runs))
    print(f"{'':24}{'median':>9}{'p90':>9}{'max':>9}  n")
    for name, values in samples.items():
        p90 = statistics.quantiles(values, n=10)[-1]
        print(f"{name:24}{statistics.median(values):9.2f}{p90:9.2f}{max(values):9.2f}  {len(values)}")
    if options.raw:
        options.raw.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()
