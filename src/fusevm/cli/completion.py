"""Completion of commands, options and ids in bash, zsh and fish."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

if TYPE_CHECKING:
    from fusevm.sdk import Fuse

#: Ids and what is said about them.
_Found = Iterable[tuple[str, str]]


def complete_environment(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of live environments."""
    del param

    def find(fuse: "Fuse") -> _Found:
        return [(env.id, f"{env.state}, {env.spec.image}") for env in fuse.environments.page(limit=200).environments]

    return _complete(ctx, incomplete, find)


def complete_host(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of hosts."""
    del param

    def find(fuse: "Fuse") -> _Found:
        return [(host.id, f"{host.state}, {host.health}") for host in fuse.hosts.page(limit=200).hosts]

    return _complete(ctx, incomplete, find)


def complete_snapshot(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of the newest snapshots."""
    del param

    def find(fuse: "Fuse") -> _Found:
        return [(one.id, f"{one.state}, {one.vm_id}") for one in fuse.snapshots.page(limit=200).snapshots]

    return _complete(ctx, incomplete, find)


def _complete(ctx: click.Context, incomplete: str, find: Callable[["Fuse"], _Found]) -> list[CompletionItem]:
    """What the server knows that begins so. Whatever goes wrong: nothing, silently."""
    from fusevm.cli import connection  # noqa: PLC0415 - only where something is completed

    try:
        flags = ctx.find_root().params
        where = connection.resolve(
            os.environ, url=flags.get("url"), token=flags.get("token"), ca_file=flags.get("ca_file")
        )
        with where.client() as fuse:
            found = find(fuse)
    except Exception:  # noqa: BLE001 - a completion never disturbs the prompt
        return []
    return [CompletionItem(id_, help=words) for id_, words in found if id_.startswith(incomplete)]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash: eval "$(fuse completion bash)"          in ~/.bashrc
    zsh:  eval "$(fuse completion zsh)"           in ~/.zshrc
    fish: fuse completion fish | source           in ~/.config/fish/config.fish
    """
    from fusevm.cli.main import cli  # noqa: PLC0415 - main imports us

    kind = get_completion_class(shell)
    if kind is None:  # pragma: no cover - click knows the three
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(cli, {}, "fuse", "_FUSE_COMPLETE").source())
