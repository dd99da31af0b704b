"""`fuse bench`: this machine against the budgets, beside the raw mechanism, in one run.

Raw means: the same kernel, initramfs, disks and VMM line from a script of some sixty lines (`raw_vmm.py`), and the same
request spoken straight to the agent. Raw and Fuse take turns, so that a noisy neighbour hits both.
"""

import json
from pathlib import Path

import click

from fusevm.cli.options import State


@click.command()
@click.option("-n", "--boots", default=20, show_default=True, metavar="N", help="Cold starts of each kind.")
@click.option("--rounds", default=100, show_default=True, metavar="N", help="Requests of each kind.")
@click.option("--mib", default=64, show_default=True, metavar="MIB", help="Size of the files and streams.")
@click.option("--image", default="debian-12", show_default=True, metavar="NAME")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the raw samples to this file.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def bench(
    state: State, /, *, boots: int, rounds: int, mib: int, image: str, json_file: Path | None, output: str
) -> int:
    """Measure cold start, exec and streams beside the raw VMM.

    Starts a Fuse of its own that leaves nothing behind. Takes minutes; prints medians, 95th percentiles and ratios.
    """
    del state
    from fusevm.cli.measurement_report import render_json, render_table  # noqa: PLC0415 - as above
    from fusevm.cli.measurements import Plan, measure_all  # noqa: PLC0415 - starts the daemons' parts

    results = measure_all(Plan(boots=boots, rounds=rounds, size_bytes=mib << 20, image=image))
    if json_file is not None:
        json_file.write_text(json.dumps(render_json(results), indent=1) + "\n")
    if output == "json":
        click.echo(json.dumps(render_json(results), indent=1))
    else:
        click.echo(render_table(results), nl=False)
    return 0
