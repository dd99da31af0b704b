"""What is in a directory that somebody else may be removing."""

from __future__ import annotations

import os
from pathlib import Path


def names_in(folder: Path) -> list[str]:
    """Names in a directory, sorted; none where there is no directory (any more). `Path.glob` raises then, at times."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except (FileNotFoundError, NotADirectoryError):
        return []
