"""`fuse key`: API keys of a control plane."""

import click

from fusevm.cli.options import Duration, State, api_options
from fusevm.cli.output import print_json, print_table, say
from fusevm.wire.rest_keys import KeyBody
from fusevm.wire.routes import Scope

_SCOPES = [scope.value for scope in Scope if scope is not Scope.OPEN]


@click.group()
def key() -> None:
    """Make, list and revoke API keys. Takes the master token."""


@key.command()
@click.argument("label", required=False)
@click.option("--tenant", default="", metavar="NAME", help="It sees and makes this tenant's environments only.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(_SCOPES), help="A right. Repeatable.")
@click.option("--expires", type=Duration(minimum_s=1), metavar="TIME", help="Refused after this long. Default: never.")
@api_options
def create(*, state: State, label: str | None, tenant: str, scopes: tuple[str, ...], expires: float | None) -> None:
    """Make a key and print its text, which nobody can read again."""
    with state.client() as fuse:
        made = fuse.api_keys.create(label or "", tenant=tenant, scopes=scopes, expires_in_seconds=round(expires or 0))
    if state.is_json:
        print_json(made)
        return
    print(made.key)
    say(f"key {made.id} may: {', '.join(made.scopes)}")


@key.command(name="list")
@click.option("-a", "--all", "everything", is_flag=True, help="Revoked ones, too.")
@api_options
def list_(*, state: State, everything: bool) -> None:
    """List keys, newest first."""
    with state.client() as fuse:
        found = [one for one in fuse.api_keys.list() if everything or not one.revoked_at]
    if state.is_json:
        print_json(found)
    else:
        columns = ("id", "label", "tenant", "scopes", "created", "last used", "expires", "revoked")
        print_table(columns, [_row(one) for one in found])


def _row(one: KeyBody) -> tuple[str, ...]:
    return (
        one.id,
        one.label,
        one.tenant,
        ",".join(one.scopes),
        one.created_at,
        one.last_used_at,
        one.expires_at,
        one.revoked_at,
    )


@key.command()
@click.argument("key_ids", metavar="KEY...", nargs=-1, required=True)
@api_options
def revoke(*, state: State, key_ids: tuple[str, ...]) -> None:
    """Refuse keys, by their ids, from their next request on."""
    with state.client() as fuse:
        for key_id in key_ids:
            fuse.api_keys.revoke(key_id)
            if not state.is_json:
                print(key_id)
    if state.is_json:
        print_json([{"id": key_id, "revoked": True} for key_id in key_ids])
