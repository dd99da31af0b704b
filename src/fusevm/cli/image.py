"""`fuse image`: what machines are made from, on this machine."""

import time
from pathlib import Path

import click

from fusevm.cli.lazy import LazyGroup
from fusevm.cli.options import State, output_options
from fusevm.cli.output import format_bytes, print_json, print_table
from fusevm.cli.places import data_option, find_places


@click.group(
    cls=LazyGroup,
    commands_by_name={
        "list": ("fusevm.cli.image:list_", "List the images of this machine."),
        "build": ("fusevm.cli.image:build", "Build an image: ours, from a recipe, a folder or a tar."),
        "pull": ("fusevm.cli.image_pull:pull", "Fetch an image from a registry, a layout or a tar."),
        "rm": ("fusevm.cli.image_removal:rm", "Remove images, or names of them."),
        "gc": ("fusevm.cli.image_removal:gc", "Remove images that nothing uses."),
    },
)
def image() -> None:
    """List, build, pull and remove images on this machine."""


@click.command(name="list")
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
                    "origin": one.record.origin,
                    "source": one.record.source,
                    "manifest_digest": one.record.manifest_digest,
                    "config": one.record.config,
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


@click.command()
@click.argument("name", required=False, default="")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, path_type=Path),
    help="Folder or tar with the root file system. Default: our recipe of that name (debian-12, debian-13).",
)
@click.option(
    "-f",
    "--file",
    "recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recipe (docs/images.md). NAME is then its own, or the file's, unless given.",
)
@click.option("--force", is_flag=True, help="Build again, with the packages of today.")
@data_option
@output_options
def build(*, state: State, name: str, source: Path | None, recipe: Path | None, force: bool, data: str | None) -> None:
    """Build the image NAME. Nothing is done when it is there already and up to date."""
    from fusevm.cli.building import Narrator, carry_out  # noqa: PLC0415 - builders load much
    from fusevm.cli.building import build as build_image  # noqa: PLC0415 - as above
    from fusevm.cli.progress import Meter  # noqa: PLC0415 - as above

    if not name and recipe is None:
        raise click.UsageError("name an image, or a recipe with -f")
    if source is not None and recipe is not None:
        raise click.UsageError("give --from or -f, not both")
    with Meter() as meter:
        root = find_places(data, state.environ).data
        made = carry_out(build_image(root, name, source, recipe, Narrator(meter), force=force))
    if state.is_json:
        print_json({"names": made.names, "digest": made.digest, "size_bytes": made.record.size_bytes})
    else:
        print(made.digest)
