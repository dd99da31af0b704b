"""`fuse image pull`: images of others for machines of this host."""

import os
from collections.abc import Mapping
from pathlib import Path

import click

from fusevm.cli.options import State, output_options
from fusevm.cli.output import print_json
from fusevm.cli.places import data_option, find_places

#: Forms of local images, as skopeo writes them.
_LOCAL = ("oci:", "oci-archive:", "docker-archive:")


@click.command()
@click.argument("reference", metavar="REF")
@click.option("--name", default="", help="Name on this host. Default: the reference's own; of a file, its stem.")
@click.option(
    "--authfile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Credentials, as `skopeo login` writes them. Default: where skopeo and docker keep them.",
)
@click.option(
    "--plain-http", is_flag=True, help="The registry speaks HTTP without TLS. Not needed for one on loopback."
)
@click.option("--force", is_flag=True, help="Fetch it again, although it is here; repairs a damaged copy.")
@data_option
@output_options
def pull(
    *,
    state: State,
    reference: str,
    name: str,
    authfile: Path | None,
    plain_http: bool,
    force: bool,
    data: str | None,
) -> None:
    """Fetch the image REF: debian:12, registry.example/team/tool@sha256:..., or from local files oci:DIR[:TAG],
    oci-archive:FILE[:TAG], docker-archive:FILE[:TAG], or just a path.

    Its layers are checked and unpacked without rights on this host; entrypoint, command, environment, user and working
    directory are kept and become the defaults of its machines.
    """
    from fusevm.cli.building import Narrator, carry_out  # noqa: PLC0415 - builders load much
    from fusevm.cli.progress import Meter  # noqa: PLC0415 - as above
    from fusevm.host.config import HostConfig  # noqa: PLC0415 - as above
    from fusevm.host.images.pull import Limits, load_image, pull_image  # noqa: PLC0415 - as above
    from fusevm.host.images.registry import Access  # noqa: PLC0415 - as above
    from fusevm.host.images.store import ImageStore  # noqa: PLC0415 - as above

    places = find_places(data, state.environ)
    defaults = HostConfig(data_root=places.host)
    limits = Limits(max_bytes=defaults.image_max_bytes, reserve_bytes=defaults.disk_reserve_bytes)
    store = ImageStore(places.data)
    local = split_local(reference)
    with Meter() as meter:
        progress = Narrator(meter).hear
        if local is not None:
            path, tag = local
            chosen = name or default_name(path, tag)
            work = load_image(store, path, tag=tag, name=chosen, limits=limits, progress=progress)
        else:
            access = Access(credentials=_read_credentials(authfile, state.environ), plain_http=plain_http)
            work = pull_image(store, reference, name=name, access=access, limits=limits, progress=progress, force=force)
        made = carry_out(work)
    if state.is_json:
        print_json({"names": made.names, "digest": made.digest, "size_bytes": made.record.size_bytes})
    else:
        print(made.digest)


def split_local(reference: str) -> tuple[Path, str] | None:
    """Path and tag of an image in local files; None for one in a registry."""
    for form in _LOCAL:
        if reference.startswith(form):
            path, _, tag = reference.removeprefix(form).partition(":")
            return Path(path), tag
    if reference.startswith(("/", "./", "../", "~")):
        return Path(reference).expanduser(), ""
    return None


def default_name(path: Path, tag: str) -> str:
    """What an image of a file is called: `tool.tar.gz` is `tool`, `oci:tool:1` is `tool:1`, a saved tag is itself."""
    if "/" in tag or ":" in tag:
        return tag
    stem = path.resolve().name.lower()
    for ending in (".gz", ".tgz", ".tar", ".oci"):
        stem = stem.removesuffix(ending)
    return f"{stem}:{tag}" if tag else stem


def _read_credentials(authfile: Path | None, environ: Mapping[str, str]) -> bytes:
    if authfile is not None:
        return authfile.read_bytes()
    for path in credential_files(environ):
        if path.is_file():
            return path.read_bytes()
    return b""


def credential_files(environ: Mapping[str, str]) -> list[Path]:
    """Where credentials may be, the first that exists counts (containers-auth.json(5))."""
    home = Path(environ.get("HOME", "/root"))
    runtime = environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    named = environ.get("REGISTRY_AUTH_FILE")
    docker = Path(environ.get("DOCKER_CONFIG", home / ".docker")) / "config.json"
    usual = [Path(runtime) / "containers/auth.json", home / ".config/containers/auth.json", docker]
    return [Path(named)] if named else usual
