"""`fuse snapshot`: take, list, show, restore and delete snapshots."""

import time
from typing import TYPE_CHECKING

import click

from fusevm.cli.completion import complete_snapshot
from fusevm.cli.options import Duration, State, api_options, environment_argument, environment_id, variables
from fusevm.cli.output import format_bytes, print_json, print_record, print_table, say
from fusevm.cli.removing import remove_each
from fusevm.model.snapshot import SnapshotState
from fusevm.sdk.words import format_age
from fusevm.wire.rest_fleet import SnapshotBody

if TYPE_CHECKING:
    from fusevm.sdk.core import SnapshotFields

_COLUMNS = ("id", "state", "env", "name", "kind", "size", "host", "age")


@click.group()
def snapshot() -> None:
    """Take, list, show, restore and delete snapshots."""


@snapshot.command()
@environment_argument
@click.option("--name", default="", help="Name to find it by.")
@click.option("--comment", default="", metavar="TEXT", help="Words for people.")
@click.option("--mode", default="", help="manual (default), auto or build; build ones never expire.")
@click.option("--retention", type=Duration(minimum_s=1), metavar="TIME", help="Deleted after this. Default: kept.")
@click.option("--metadata", multiple=True, metavar="K=V", help="More about it. Repeatable.")
@click.option("--layer-key", default="", metavar="KEY", help="Key of a build layer.")
@click.option("--live", is_flag=True, help="With the memory, where the host can.")
@click.option("--no-wait", is_flag=True, help="Return at once, state creating.")
@api_options
def create(
    *,
    state: State,
    env_id: str,
    name: str,
    comment: str,
    mode: str,
    retention: float | None,
    metadata: tuple[str, ...],
    layer_key: str,
    live: bool,
    no_wait: bool,
) -> None:
    """Take a snapshot of ENV, which must be running, and print its id."""
    fields: SnapshotFields = {
        "comment": comment,
        "mode": mode,
        "retention_seconds": round(retention or 0),
        "metadata": variables(metadata, "--metadata") | ({"name": name} if name else {}),
        "layer_key": layer_key,
        "live": live,
    }
    with state.client() as fuse:
        take = fuse.snapshots.begin if no_wait else fuse.snapshots.create
        taken = take(environment_id(env_id), **fields)
    if state.is_json:
        print_json(taken)
        return
    print(taken.id)
    if taken.state == SnapshotState.READY:
        say(f"{format_bytes(taken.size_bytes)} on host {taken.host_id}")


@snapshot.command(name="list")
@click.option("--env", "env_id", default="", metavar="ENV", help="Only of the environments of this id.")
@click.option("--state", "wanted", type=click.Choice([state.value for state in SnapshotState]), help="Only these.")
@click.option("--mode", default="", help="Only of this mode.")
@click.option("--name", default="", help="Only of this name.")
@click.option("--layer-key", default="", metavar="KEY", help="Only of this layer.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@api_options
def list_(*, state: State, env_id: str, wanted: str | None, mode: str, name: str, layer_key: str, quiet: bool) -> None:
    """List snapshots, newest first."""
    vm_id = environment_id(env_id) if env_id else ""
    with state.client() as fuse:
        found = list(fuse.snapshots.list(vm_id=vm_id, state=wanted or "", mode=mode, name=name, layer_key=layer_key))
    if state.is_json:
        print_json(found)
    elif quiet:
        for one in found:
            print(one.id)
    else:
        print_table(_COLUMNS, [_row(one, time.time()) for one in found])


def _row(one: SnapshotBody, now_s: float) -> tuple[str, ...]:
    return (
        one.id,
        one.state,
        one.vm_id,
        one.name,
        one.kind,
        format_bytes(one.size_bytes),
        one.host_id,
        format_age(one.created_at, now_s),
    )


@snapshot.command()
@click.argument("snapshot_id", metavar="SNAPSHOT", shell_complete=complete_snapshot)
@api_options
def get(*, state: State, snapshot_id: str) -> None:
    """Show one snapshot."""
    with state.client() as fuse:
        one = fuse.snapshots.get(snapshot_id)
    if state.is_json:
        print_json(one)
        return
    print_record(
        [
            ("id", one.id),
            ("state", one.state),
            ("error", one.last_error),
            ("environment", f"{one.vm_id} ({one.uid})"),
            ("name", one.name),
            ("comment", one.comment),
            ("kind", one.kind),
            ("mode", one.mode),
            ("size", format_bytes(one.size_bytes)),
            ("digest", one.digest),
            ("host", one.host_id),
            ("arch", one.arch),
            ("parent", one.parent_snapshot_id),
            ("layer key", one.layer_key),
            ("metadata", ", ".join(f"{name}={value}" for name, value in one.metadata.items())),
            ("tenant", one.tenant_id),
            ("kept until", one.retention_until),
            ("created", one.created_at),
        ]
    )


@snapshot.command()
@click.argument("snapshot_id", metavar="SNAPSHOT", shell_complete=complete_snapshot)
@api_options
def restore(*, state: State, snapshot_id: str) -> None:
    """Put the running environment that it was taken of back to it. What was written since is lost."""
    with state.client() as fuse:
        fuse.snapshots.restore(snapshot_id)
        if state.is_json:
            print_json(fuse.snapshots.get(snapshot_id))
        else:
            print(snapshot_id)


@snapshot.command()
@click.argument("snapshot_ids", metavar="SNAPSHOT...", nargs=-1, required=True, shell_complete=complete_snapshot)
@click.option("--no-wait", is_flag=True, help="Do not wait until their bytes are freed.")
@api_options
def rm(*, state: State, snapshot_ids: tuple[str, ...], no_wait: bool) -> int:
    """Delete snapshots. Goes on after a failure, and ends with its code."""
    with state.client() as fuse:
        return remove_each(
            lambda one: fuse.snapshots.delete(one, wait=not no_wait), snapshot_ids, is_json=state.is_json
        )
