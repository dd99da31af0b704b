"""What a run that was killed within a step leaves beside the path that it was changing: half a file, a link that was
not renamed yet, a folder that was being removed. Each has a name that tells whose it is, so that the next run finds it.

    .<name>.<random>.tmp   a file that is being written (`write_durably`)
    .<name>.new            a link that is being pointed elsewhere
    .<name>.removed        a folder that is being removed

Only one run at a time changes the machine: what is found is nobody's work any more.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Final

_ENDS: Final = r"(?:[0-9a-f]{8}\.tmp|new|removed)"


def doomed_name(path: Path) -> Path:
    """What a folder is called while it is being removed."""
    return path.with_name(f".{path.name}.removed")


def find_beside(path: Path) -> list[Path]:
    """What killed runs have left beside a path."""
    wanted = re.compile(rf"\.{re.escape(path.name)}\.{_ENDS}")
    try:
        return sorted(one for one in path.parent.iterdir() if wanted.fullmatch(one.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def find_doomed(folder: Path) -> list[Path]:
    """The paths in a folder whose removal was begun, by the names that they had."""
    return sorted(path.with_name(path.name[1 : -len(".removed")]) for path in folder.glob(".*.removed"))


def is_there(path: Path) -> bool:
    """Is anything at a path, or left beside it?"""
    return os.path.lexists(path) or bool(find_beside(path))


def clear_beside(path: Path) -> None:
    """Remove what killed runs have left beside a path."""
    for one in find_beside(path):
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove whatever is there; a folder is renamed first, so that no half of it is left under its name."""
    clear_beside(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    path.rename(doomed_name(path))
    shutil.rmtree(doomed_name(path))


def replace_link(link: Path, target: Path) -> None:
    """Let a link name a target, at once. What else is in its place is the caller's affair."""
    clear_beside(link)
    new = link.with_name(f".{link.name}.new")
    new.symlink_to(target)
    new.replace(link)
