"""Completion of commands, options and environment ids in bash, zsh and fish."""

import os

import click
from click.shell_completion import CompletionItem, get_completion_class

_DEADLINE_S = 2.0


def complete_environment(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of live environments. Whatever goes wrong: none, silently."""
    del param
    from fusevm.cli import connection  # noqa: PLC0415 - only where something is completed

    try:
        flags = ctx.find_root().params
        where = connection.resolve(
            os.environ, url=flags.get("url"), token=flags.get("token"), ca_file=flags.get("ca_file")
        )
        with where.client() as fuse:
            page = fuse.environments.page(limit=200)
    except Exception:  # noqa: BLE001 - a completion never disturbs the prompt
        return []
    return [
        CompletionItem(env.id, help=f"{env.state}, {env.spec.image}")
        for env in page.environments
        if env.id.startswith(incomplete)
    ]


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
