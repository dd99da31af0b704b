"""`fuse bench`: measure this machine against the budgets."""

import click

from fusevm.cli.options import State, api_options


@click.command(context_settings={"ignore_unknown_options": True})
@api_options
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(*, state: State, arguments: tuple[str, ...]) -> int:
    """Measure cold start, exec and lists, beside the raw VMM."""
    return run_benchmarks(state, arguments)


def run_benchmarks(state: State, arguments: tuple[str, ...]) -> int:
    """Run the benchmarks and return the exit code. The seam: `state.client()` is the SDK, `host.vmm` the raw side."""
    del state, arguments
    raise click.ClickException("the benchmarks are not built yet")
