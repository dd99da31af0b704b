"""`fuse doctor`: is this machine fit to run environments?"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from fusevm.cli import settings
from fusevm.cli.options import State, output_options
from fusevm.cli.output import is_terminal, print_json
from fusevm.cli.places import data_option
from fusevm.cli.setting_options import config_option, settings_options

_MARKS = {"ok": ("ok      ", "green"), "degraded": ("degraded", "yellow"), "unfit": ("unfit   ", "red")}
_ENDINGS = {
    "fit": "This machine is fit.",
    "degraded": "Machines run here, but see above.",
    "unfit": "Machines cannot run here; see above.",
}


@click.command()
@data_option
@config_option
@settings_options(settings.HOST)
@output_options
def doctor(*, state: State, data: str | None, config_file: Path | None, **flags: Any) -> int:
    """Check this machine, with a remedy for everything that is missing. Changes nothing.

    Exit code 0: fit; 1: degraded, machines run but something is worse than it could be; 2: unfit.
    """
    from fusevm.cli.host_settings import host_config  # noqa: PLC0415 - the daemon's parts are only for this command
    from fusevm.cli.install.env_file import read_installed  # noqa: PLC0415 - as below
    from fusevm.host.doctor import examine, exit_status, judge  # noqa: PLC0415 - as above

    # Those of the installed daemon, unless another folder is asked about.
    installed = {} if data else read_installed()
    loaded = settings.load("host", flags, {**installed, **os.environ}, config_file)
    with loaded.naming_sources():
        config = host_config(loaded, os.environ, data)
        config.check()
    reports = asyncio.run(examine(config))
    verdict = judge(reports)
    if state.is_json:
        print_json({"verdict": verdict, "checks": reports})
        return exit_status(reports)
    width = max(len(report.name) for report in reports)
    for report in reports:
        mark, colour = _MARKS[report.level]
        shown = click.style(mark, fg=colour) if is_terminal(sys.stdout) else mark
        number = str(report.number or "")
        click.echo(f"{shown}  {number:>2}  {report.name:<{width}}  {report.found}")
        if report.remedy:
            click.echo(f"{'':12}  {'':<{width}}  -> {report.remedy}")
    click.echo(_ENDINGS[verdict])
    return exit_status(reports)
