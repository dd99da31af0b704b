"""The few commands of a machine that does not exist, and shell scripts made of them.

`echo WORDS`, `cat` (stdin to stdout), `bytes N` (N zero bytes), `stderr WORDS` (status 1), `printenv NAME`, `pwd`,
`true`, `false`, `exit N`, `garbage` (no text); `hang` and `sleep N` never end by themselves. `sh -c TEXT` runs
statements between `;` and line ends, to the first `exit`; `echo ... >&2` goes to the standard error.
"""

import shlex
from collections.abc import Mapping, Sequence

import msgspec

from fusevm.model.errors import CommandNotFound


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """What a command said, and how it ended. `code` None: it goes on until somebody ends it."""

    code: int | None = 0
    stdout: bytes = b""
    stderr: bytes = b""


def run(cmd: Sequence[str], stdin: bytes = b"", env: Mapping[str, str] | None = None, cwd: str = "/") -> Ran:
    """Run a command to its end. Raises CommandNotFound."""
    match list(cmd):
        case ["echo", *words]:
            return Ran(stdout=(" ".join(words) + "\n").encode())
        case ["cat"]:
            return Ran(stdout=stdin)
        case ["bytes", count] if count.isdecimal():
            return Ran(stdout=bytes(int(count)))
        case ["stderr", *words]:
            return Ran(code=1, stderr=(" ".join(words) + "\n").encode())
        case ["printenv", name]:
            value = (env or {}).get(name)
            return Ran(code=1) if value is None else Ran(stdout=f"{value}\n".encode())
        case ["pwd"]:
            return Ran(stdout=f"{cwd}\n".encode())
        case ["true"] | ["false"]:
            return Ran(code=int(cmd[0] == "false"))
        case ["exit", code] if code.isdecimal():
            return Ran(code=int(code))
        case ["garbage"]:
            return Ran(stdout=b"\xff\xfe")
        case ["hang"] | ["sleep", _]:
            return Ran(code=None)
        case ["sh", "-c", text]:
            return run_script(text, env, cwd)
        case _:
            raise CommandNotFound(command=" ".join(cmd))


def run_script(text: str, env: Mapping[str, str] | None = None, cwd: str = "/") -> Ran:
    """Run statements one after the other. Raises CommandNotFound."""
    done = Ran()
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        for statement in line.split(";"):
            try:
                words = shlex.split(statement.replace(">&2", " >&2 "))
            except ValueError as error:  # as a shell that cannot read its script
                return Ran(code=2, stdout=done.stdout, stderr=done.stderr + f"sh: {error}\n".encode())
            is_error = ">&2" in words
            words = [word for word in words if word not in (">&2", "exec")]
            if not words:
                continue
            last = run(words, b"", env, cwd)
            out = b"" if is_error else last.stdout
            err = last.stdout + last.stderr if is_error else last.stderr
            done = Ran(code=last.code, stdout=done.stdout + out, stderr=done.stderr + err)
            if last.code is None or words[0] == "exit":
                return done
    return done
