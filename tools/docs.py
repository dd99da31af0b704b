"""Write the parts of the documentation that are derived from code. `--check` only compares, as the test does."""

import sys
from collections.abc import Callable
from pathlib import Path

from fusevm.core.diagram import render_states
from fusevm.model.errors import error_classes, field_names

ROOT = Path(__file__).resolve().parent.parent


def render_errors() -> str:
    """Every error as a table, by code and reason."""
    lines = [
        "# Errors",
        "",
        "Every answer that is no success carries `code` (short, the contract's) and `details.reason` (ours, stable).",
        "The other details are the fields listed here, as strings. Host daemon and guest agent use the same codes and",
        "reasons. Generated from `fusevm.model.errors`.",
        "",
        "| code | reason | status | retry helps | message | details |",
        "|---|---|---|---|---|---|",
    ]
    for cls in sorted(error_classes(), key=lambda item: (item.code, item.status, item.reason)):
        fields = ", ".join(f"`{name}`" for name in field_names(cls))
        message = cls.template.replace("|", "\\|")
        retry = "yes" if cls.retryable else ""
        lines.append(f"| `{cls.code}` | `{cls.reason}` | {cls.status} | {retry} | {message} | {fields} |")
    return "\n".join(lines) + "\n"


DOCUMENTS: dict[str, Callable[[], str]] = {"docs/errors.md": render_errors, "docs/states.md": render_states}


def stale() -> list[str]:
    """The generated documents that differ from what the code says now."""
    return [
        name
        for name, render in DOCUMENTS.items()
        if not (ROOT / name).exists() or (ROOT / name).read_text() != render()
    ]


def main() -> int:
    """Write the documents, or with --check name the stale ones."""
    names = stale()
    if "--check" in sys.argv:
        for name in names:
            print(f"{name} is out of date; run `make docs`")
        return 1 if names else 0
    for name in names:
        (ROOT / name).write_text(DOCUMENTS[name]())
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
