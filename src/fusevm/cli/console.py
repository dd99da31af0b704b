"""`fuse console`: the web console."""

import importlib.util

import click

from fusevm.cli.failures import CliError
from fusevm.cli.options import State, api_options

DEFAULT_LISTEN = "localhost:4000"
_INSTALL = "install it: `make console` in the source folder, or pip install -r requirements/console.txt"


@click.command()
@click.option(
    "--listen",
    default=DEFAULT_LISTEN,
    show_default=True,
    metavar="ADDR",
    help="Loopback address, host:port; port 0: any.",
)
@click.option("--ready-file", default="", hidden=True, help="Written with the address, key included, once it serves.")
@api_options
def console(*, state: State, listen: str, ready_file: str) -> int:
    """Show environments and hosts in a browser, until Ctrl-C.

    The address that it prints holds a key: whoever has it uses the control plane with your token.
    """
    from fusevm.console.config import ConsoleConfig, check  # noqa: PLC0415 - only for this command
    from fusevm.control.config import parse_listen  # noqa: PLC0415 - as above

    host, port = parse_listen(listen)
    to = state.connection()
    config = ConsoleConfig(
        host=host,
        port=port,
        url=to.url,
        token=to.token,
        ca_file=to.ca_file,
        pin_certificate=to.pin_certificate,
        ready_file=ready_file,
    )
    check(config)
    if importlib.util.find_spec("nicegui") is None:
        raise CliError("the console's packages are not installed", hint=_INSTALL)
    from fusevm.console.main import serve  # noqa: PLC0415 - NiceGUI's weight is only for this command

    return serve(config)
