"""Settings as options of a command: one option per row of a table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from fusevm.cli.settings import Setting, default_file

F = TypeVar("F", bound=Callable[..., Any])


def settings_options(table: Sequence[Setting]) -> Callable[[F], F]:
    """Add the flags of a table; each is passed as text under the setting's name, None where not given."""

    def decorate(function: F) -> F:
        for setting in reversed(table):
            function = _option(setting)(function)
        return function

    return decorate


def _option(setting: Setting) -> Callable[[F], F]:
    secret = " Better given by the variable: flags are visible to others." if setting.is_secret else ""
    text = f"{setting.help}{secret} [env: {setting.env}]"
    if setting.is_switch:
        return click.option(f"{setting.flag}/--no-{setting.flag[2:]}", setting.name, default=None, help=text)
    metavar = setting.flag.rsplit("-", 1)[-1].upper()
    return click.option(setting.flag, setting.name, default=None, metavar=metavar, help=text)


def config_option(function: F) -> F:
    """Add --config FILE."""

    def find(context: click.Context, param: click.Parameter, value: str | None) -> Path | None:
        del param
        return Path(value) if value else default_file(context.obj.environ)

    return click.option(
        "--config",
        "config_file",
        metavar="FILE",
        callback=find,
        help="Settings file (TOML). Default ~/.config/fuse/fuse.toml, /etc/fuse/fuse.toml. [env: FUSE_CONFIG]",
    )(function)
