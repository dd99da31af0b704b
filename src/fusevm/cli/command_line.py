"""Command lines that end in somebody else's command: `fuse exec [OPTIONS] ENV [OPTIONS] [--] COMMAND...`.

Our options end where the command begins: at `--`, or at the second word that is no option. What follows is the
command's, whatever it looks like.
"""

import click


class CommandLine(click.Command):
    """A command whose arguments are one word of ours and then `command`."""

    ignore_unknown_options = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find where the command begins, then parse as click does."""
        ctx.allow_interspersed_args = "--" in args and self._command_before(ctx, args) == []
        rest = super().parse_args(ctx, args)
        command = ctx.params.get("command") or ()
        if command[:1] == ("--",):
            ctx.params["command"] = command = command[1:]
        elif command and command[0].startswith("-") and not ctx.allow_interspersed_args:
            raise click.UsageError(f"{command[0]}: no such option here; put -- before the command", ctx)
        ours = next(value for name, value in ctx.params.items() if name in ("env_id", "image"))
        if isinstance(ours, str) and ours.startswith("-"):
            raise click.NoSuchOption(ours, ctx=ctx)
        return rest

    def _command_before(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The words of the command that stand before `--` already."""
        ctx.allow_interspersed_args = True
        try:
            values, _, _ = self.make_parser(ctx).parse_args(args[: args.index("--")])
        except click.UsageError:  # such as a missing value; reported by the real parse
            return []
        words = values.get("command")
        words = list(words) if isinstance(words, tuple | list) else []
        if words and words[0].startswith("-"):
            raise click.NoSuchOption(words[0], ctx=ctx)
        return words
