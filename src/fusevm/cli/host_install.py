"""`fuse host install|start|install-service|upgrade|uninstall|install-control`: Fuse as services of this machine."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from fusevm.cli import settings
from fusevm.cli.failures import USAGE, CliError
from fusevm.cli.options import State, output_options
from fusevm.cli.output import print_json, say
from fusevm.cli.setting_options import settings_options

_HELP_PLAN = "Print what would be done, and do nothing."


def _host_options(function: Any) -> Any:
    """What `install` and `upgrade` take."""
    for option in reversed((
        click.option("--from", "source", type=click.Path(exists=True, file_okay=False, path_type=Path),
                     help="Folder with files that were brought here; what is in it is not downloaded."),
        click.option("--mirror", metavar="URL", default="", help="Download by name from here, not from the origin."),
        click.option("--sha256", "digests", metavar="NAME=DIGEST", multiple=True,
                     help="The digest of a file that is not the pinned one. Repeatable."),
        click.option("--image", metavar="NAME", default="debian-12", show_default=True,
                     help="Image to build; empty: none."),
        click.option("--plan", "is_plan", is_flag=True, help=_HELP_PLAN),
        settings_options(settings.HOST),
        output_options,
    )):  # fmt: skip
        function = option(function)
    return function


@click.command()
@_host_options
def install(*, state: State, is_plan: bool, **given: Any) -> None:
    """Turn this machine into a host: packages, VMMs, kernels, base image, service, token. As root; safe to repeat.

    Prints two lines that a control plane is given. Settings become lines of /etc/fuse/host.env.
    """
    from fusevm.cli.install.plan import plan_host  # noqa: PLC0415 - builders load much

    _install(state, given, plan_host, is_plan=is_plan)


@click.command(name="install-service")
@_host_options
def install_service(*, state: State, is_plan: bool, **given: Any) -> None:
    """Install settings, token and unit of the host daemon, and nothing else."""
    from fusevm.cli.install.plan import plan_service  # noqa: PLC0415 - as above

    _install(state, given, plan_service, is_plan=is_plan)


@click.command()
@_host_options
def start(*, state: State, is_plan: bool, **given: Any) -> None:
    """Start the installed host daemon and wait until it serves; print how to reach it."""
    from fusevm.cli.install.plan import plan_start  # noqa: PLC0415 - as above

    _require_unit()
    _install(state, given, plan_start, is_plan=is_plan)


@click.command()
@_host_options
def upgrade(*, state: State, is_plan: bool, **given: Any) -> None:
    """Let the services of this machine run this `fuse`. Machines run on meanwhile.

    When the new host daemon does not start, the old one is put back.
    """
    from fusevm.cli.install.plan import plan_upgrade  # noqa: PLC0415 - as above

    _require_unit()
    _install(state, given, plan_upgrade, is_plan=is_plan)


def _require_unit() -> None:
    from fusevm.cli.install.plan import HOST_UNIT, Places  # noqa: PLC0415 - as above

    unit = Places().units / HOST_UNIT
    if not unit.exists():
        raise CliError(f"{unit} is not there", hint="`fuse host install` installs a host", code=USAGE)


def _install(state: State, given: dict[str, Any], plan: Callable[..., Sequence[Any]], *, is_plan: bool) -> None:
    from fusevm.cli.install import session  # noqa: PLC0415 - as above

    work = session.open_host(given)
    steps = work.plan(plan)
    if is_plan:
        _print_plan(state, steps)
        return
    work.carry_out(plan)
    base_url, token = work.connection()
    _print_lines(state, {"FIRECRACKER_BASE_URL": base_url, "FIRECRACKER_TOKEN": token})


def _print_plan(state: State, steps: Sequence[Any]) -> None:
    lines = [step.describe() for step in steps]
    if state.is_json:
        print_json({"steps": lines})
        return
    for line in lines or ["nothing is to be done"]:
        print(line)


def _print_lines(state: State, values: dict[str, str]) -> None:
    if state.is_json:
        print_json(values)
        return
    for name, value in values.items():
        print(f"{name}={value}")


@click.command(name="install-control")
@click.option("--database-url", metavar="URL", help="Database of the control plane. [env: DATABASE_URL]")
@click.option("--listen", metavar="HOST:PORT", help="Where it listens. Default 127.0.0.1:8080.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
              help="Certificate chain (PEM) to serve with.")  # fmt: skip
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
              help="Its key (PEM); may be readable by root alone.")  # fmt: skip
@click.option("--plan", "is_plan", is_flag=True, help=_HELP_PLAN)
@output_options
def install_control(
    *,
    state: State,
    database_url: str | None,
    listen: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    is_plan: bool,
) -> None:
    """Run a control plane beside this machine's host daemon. Asks for a database; keys are made once and kept.

    Prints two lines that clients are given.
    """
    from fusevm.cli.install import session  # noqa: PLC0415 - as above

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together")
    work = session.open_control(listen=listen, tls=(tls_cert, tls_key) if tls_cert and tls_key else None)
    if database_url is None:
        database_url = os.environ.get("DATABASE_URL") or work.known_database()
    if not database_url and not is_plan:
        database_url = _ask_database(session.DEFAULT_DATABASE)
    work.choose_database(database_url or session.DEFAULT_DATABASE)
    if is_plan:
        _print_plan(state, work.plan())
        return
    work.carry_out()
    base_url, token = work.connection()
    _print_lines(state, {"FUSE_BASE_URL": base_url, "FUSE_TOKEN": token})


def _ask_database(default: str) -> str:
    if not sys.stdin.isatty():
        say(f"DATABASE_URL is not given: {default} is used")
        return default
    answer: str = click.prompt("DATABASE_URL", default=default, err=True)
    return answer


@click.command()
@click.option("--keep-data", is_flag=True, help="Leave machines' disks, images, settings and keys.")
@click.option("--force", is_flag=True, help="Also with machines: they end.")
@click.option("--plan", "is_plan", is_flag=True, help=_HELP_PLAN)
@output_options
def uninstall(*, state: State, keep_data: bool, force: bool, is_plan: bool) -> None:
    """Remove the services of this machine, and all that they have made. Packages of the distribution stay."""
    from fusevm.cli.install import session  # noqa: PLC0415 - as above

    work = session.open_removal(keeps_data=keep_data)
    if is_plan:
        _print_plan(state, work.plan())
        return
    work.carry_out(is_forced=force)
