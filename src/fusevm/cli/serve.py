"""`fuse serve`: the control plane."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusevm.cli import settings
from fusevm.cli.control_table import UNHONOURED
from fusevm.cli.failures import USAGE, CliError
from fusevm.cli.output import say
from fusevm.cli.setting_options import config_option, settings_options
from fusevm.cli.supervised import follow_supervisor

if TYPE_CHECKING:
    from fusevm.control.config import ControlConfig
    from fusevm.core.policy import Policy


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

        for line in unhonoured(os.environ):
            say(line)
        follow_supervisor(os.environ)
        return run(config)


def control_config(loaded: settings.Loaded, *, drop_to_uid: int | None = None, ready_file: str = "") -> "ControlConfig":
    """The control plane's configuration from settings. Raises BadSetting."""
    from fusevm.control.config import ControlConfig, HostSetting  # noqa: PLC0415 - as above
    from fusevm.control.store.location import MEMORY  # noqa: PLC0415 - as above

    url, token = loaded["firecracker_url"], loaded["firecracker_token"]
    return ControlConfig(
        listen=loaded["listen"],
        database=loaded["database_url"] or MEMORY,
        database_pool=loaded["database_pool"],
        auth_token=loaded["auth_token"],
        require_auth=loaded["require_auth"],
        tls_cert=loaded["tls_cert"],
        tls_key=loaded["tls_key"],
        allowed_cidrs=loaded["allowed_cidrs"],
        trusted_proxies=loaded["trusted_proxies"],
        cors_origins=loaded["cors_origins"],
        secure_cookies=loaded["secure_cookies"],
        metrics_auth=loaded["metrics_auth"],
        allowed_hosts=loaded["allowed_hosts"],
        hosts=(HostSetting(id="default", url=url, token=token),) if url else (),
        allow_local_hosts=loaded["allow_local_hosts"],
        policy=policy(loaded),
        encryption_key=loaded["token_encryption_key"],
        previous_keys=loaded["token_encryption_key_previous"],
        agents=loaded.agents,
        agent_download_url=loaded["agent_download_url"],
        agent_download_sha256=loaded["agent_download_sha256"],
        drop_to_uid=drop_to_uid,
        ready_file=ready_file,
        retention_s=loaded["retention_seconds"],
        lease_s=loaded["lease_seconds"],
        shutdown_s=loaded["shutdown_timeout_seconds"],
        log_level=loaded["log_level"],
        log_json=loaded["log_json"],
    )


def policy(loaded: settings.Loaded) -> "Policy":
    """The limits and delays of the decisions."""
    from fusevm.core.policy import Policy  # noqa: PLC0415 - as above

    longest = loaded["max_runtime_seconds"]
    return Policy(
        placement=loaded["placement"],
        cpu_overcommit_percent=round(loaded["cpu_overcommit"] * 100),
        ram_overcommit_percent=round(loaded["ram_overcommit"] * 100),
        storage_overcommit_percent=round(loaded["storage_overcommit"] * 100),
        default_max_runtime_seconds=loaded["default_runtime_seconds"],
        allow_unlimited_runtime=longest < 0,
        longest_runtime_seconds=max(longest, 0),
        default_idle_timeout_seconds=loaded["default_idle_timeout_seconds"],
        linger_ms=loaded["linger_seconds"] * 1000,
        max_queue_seconds=loaded["max_queue_seconds"],
        default_startup_timeout_s=loaded["startup_script_timeout_seconds"],
        max_startup_timeout_s=loaded["max_startup_script_timeout_seconds"],
    )


def unhonoured(environ: Mapping[str, str]) -> list[str]:
    """A sentence about every variable of the seed that is set and means nothing here."""
    return [
        f"{name} has no effect: {why}"
        for name, (same, why) in UNHONOURED.items()
        if environ.get(name, "") not in ("", same)
    ]


def user_id(name: str) -> int:
    """The uid of a user by name or number."""
    import pwd  # noqa: PLC0415 - only with --user

    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise CliError(f"--user: this machine knows no user {name!r}", code=USAGE) from error
