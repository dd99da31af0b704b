"""`fuse image`: what machines are made from, on this machine."""

import time
from pathlib import Path

import click

from fusevm.cli.options import State, output_options
from fusevm.cli.output import format_bytes, print_json, print_table
from fusevm.cli.places import data_option, find_places


@click.group()
def image() -> None:
    """List and build images on this machine."""


@image.command(name="list")
@data_option
@output_options
def list_(*, state: State, data: str | None) -> None:
    """List the images of this machine."""
    from fusevm.cli.building import carry_out  # noqa: PLC0415 - builders load much
    from fusevm.host.images.store import ImageStore  # noqa: PLC0415 - as above

    found = carry_out(ImageStore(find_places(data, state.environ).data).load_all())
    if state.is_json:
        print_json(
            [
                {
                    "names": one.names,
                    "digest": one.digest,
                    "size_bytes": one.record.size_bytes,
                    "architecture": one.record.architecture,
                    "source": one.record.source,
                    "created_at_ms": one.record.created_at_ms,
                }
                for one in found
            ]
        )
        return
    rows = [
        (
            ", ".join(one.names) or "-",
            one.digest.removeprefix("sha256:")[:12],
            format_bytes(one.record.size_bytes),
            _age(one.record.created_at_ms),
            one.record.source,
        )
        for one in found
    ]
    print_table(("name", "digest", "size", "age", "source"), rows)


def _age(at_ms: int) -> str:
    days = (time.time() - at_ms / 1000) / 86_400
    return f"{days:.0f}d" if days >= 1 else f"{max(days * 24, 0):.0f}h"


@image.command()
@click.argument("name")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, path_type=Path),
    help="Folder or tar with the root file system. Default: our recipe of that name (debian-12, debian-13).",
)
@click.option("--force", is_flag=True, help="Build again, with the packages of today.")
@data_option
@output_options
def build(*, state: State, name: str, source: Path | None, force: bool, data: str | None) -> None:
    """Build the image NAME. Nothing is done when it is there already and up to date."""
    from fusevm.cli.building import Narrator, carry_out  # noqa: PLC0415 - builders load much
    from fusevm.cli.building import build as build_image  # noqa: PLC0415 - as above
    from fusevm.cli.progress import Meter  # noqa: PLC0415 - as above

    with Meter() as meter:
        root = find_places(data, state.environ).data
        made = carry_out(build_image(root, name, source, Narrator(meter), force=force))
    if state.is_json:
        print_json({"names": made.names, "digest": made.digest, "size_bytes": made.record.size_bytes})
    else:
        print(made.digest)
