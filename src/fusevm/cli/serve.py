"""`fuse serve`: the control plane."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusevm.cli import settings
from fusevm.cli.failures import USAGE, CliError
from fusevm.cli.setting_options import config_option, settings_options
from fusevm.cli.supervised import follow_supervisor

if TYPE_CHECKING:
    from fusevm.control.config import ControlConfig


@click.command()
@config_option
@click.option("--user", default="", metavar="USER", help="When started as root: become this user after binding.")
@click.option("--ready-file", default="", hidden=True, help="Written with the URL once requests are served.")
@settings_options(settings.CONTROL)
def serve(*, config_file: Path | None, user: str, ready_file: str, **flags: Any) -> int:
    """Run the control plane in the foreground until SIGTERM or Ctrl-C.

    Each setting is taken from its flag, else its variable, else the [control] section of the settings file, else its
    default.
    """
    loaded = settings.load("control", flags, os.environ, config_file)
    with loaded.naming_sources():
        config = control_config(loaded, drop_to_uid=user_id(user) if user else None, ready_file=ready_file)
        from fusevm.control.main import serve as run  # noqa: PLC0415 - the server's weight is only for this command

        follow_supervisor(os.environ)
        return run(config)


def control_config(loaded: settings.Loaded, *, drop_to_uid: int | None = None, ready_file: str = "") -> "ControlConfig":
    """The control plane's configuration from settings. Raises BadSetting."""
    from fusevm.control.config import MEMORY, ControlConfig, HostSetting  # noqa: PLC0415 - as above

    refuse_unenforced(loaded)
    url, token = loaded["firecracker_url"], loaded["firecracker_token"]
    return ControlConfig(
        listen=loaded["listen"],
        database=loaded["database_url"] or MEMORY,
        auth_token=loaded["auth_token"],
        require_auth=loaded["require_auth"],
        tls_cert=loaded["tls_cert"],
        tls_key=loaded["tls_key"],
        allowed_hosts=loaded["allowed_hosts"],
        hosts=(HostSetting(id="default", url=url, token=token),) if url else (),
        encryption_key=loaded["token_encryption_key"],
        drop_to_uid=drop_to_uid,
        ready_file=ready_file,
        shutdown_s=loaded["shutdown_timeout_seconds"],
        log_level=loaded["log_level"],
        log_json=loaded["log_json"],
    )


def refuse_unenforced(loaded: settings.Loaded) -> None:
    """An allowlist that nobody checks would be worse than none."""
    from fusevm.control.config import ControlConfig  # noqa: PLC0415 - as above

    if loaded["allowed_cidrs"] and "allowed_cidrs" not in ControlConfig.__struct_fields__:
        raise CliError(
            f"{loaded.source('allowed_cidrs')}: this version does not check addresses",
            hint="unset it and restrict access by a firewall",
            code=USAGE,
        )


def user_id(name: str) -> int:
    """The uid of a user by name or number."""
    import pwd  # noqa: PLC0415 - only with --user

    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise CliError(f"--user: this machine knows no user {name!r}", code=USAGE) from error
