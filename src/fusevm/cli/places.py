"""Where a local installation keeps its things. One folder holds everything:

<data>/images, kernels, initramfs   what machines are made from (shared)
<data>/host                         the host daemon's journal, disks, keys; host.json and token
<data>/control                      the control plane's database
<data>/log                          output of both
<data>/up.json, up.lock             who runs it
<data>/api-token                    the master token (0600)
"""

import os
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec

from fusevm.cli.settings import default_data_root


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """The paths below a data folder."""

    data: Path

    @property
    def host(self) -> Path:
        return self.data / "host"

    @property
    def control(self) -> Path:
        return self.data / "control"

    @property
    def logs(self) -> Path:
        return self.data / "log"

    @property
    def record(self) -> Path:
        return self.data / "up.json"

    @property
    def lock(self) -> Path:
        return self.data / "up.lock"

    @property
    def settings(self) -> Path:
        return self.data / "settings.json"

    @property
    def token(self) -> Path:
        return self.data / "api-token"


def find_places(data: str | None, environ: Mapping[str, str]) -> Places:
    """The places of a folder: --data, else FUSE_DATA_DIR, else the default of this user."""
    given = data or environ.get("FUSE_DATA_DIR")
    root = Path(given).expanduser().absolute() if given else default_data_root(environ, is_root=os.geteuid() == 0)
    return Places(data=root)


def data_option(function: click.decorators.FC) -> click.decorators.FC:
    """Add --data DIR."""
    return click.option(
        "--data",
        metavar="DIR",
        help="Folder of everything. Default /var/lib/fuse for root, $XDG_DATA_HOME/fuse otherwise. "
        "[env: FUSE_DATA_DIR]",
    )(function)
