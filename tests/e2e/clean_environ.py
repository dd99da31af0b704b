"""An environment without the settings of whoever runs the tests."""

import os
from pathlib import Path

from own_world import MARK


def clean_environ(home: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", MARK) if name in os.environ}
    return kept | {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "data"),
        "TERM": "xterm-256color",
        "PYTHONWARNINGS": "error",
    }
