"""Destroy several environments, or delete several other things, at the same time."""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fusevm.cli.failures import report
from fusevm.model.errors import Error
from fusevm.sdk.client import Fuse
from fusevm.wire.exit_status import exit_status

_AT_ONCE = 8


def remove_all(
    fuse: Fuse, env_ids: Sequence[str], *, wait: bool = True, is_json: bool = False, done: Callable[[str], None] = print
) -> int:
    """Destroy them all, failures apart; the exit code of the first failure, or 0. `done` hears of each that is gone."""
    return remove_each(lambda env_id: fuse.environments.delete(env_id, wait=wait), env_ids, is_json=is_json, done=done)


def remove_each(
    delete: Callable[[str], None], ids: Sequence[str], *, is_json: bool, done: Callable[[str], None] = print
) -> int:
    """Delete everything of these ids, failures apart; the exit code of the first failure, or 0."""

    def remove(one: str) -> Error | None:
        try:
            delete(one)
        except Error as error:
            return error
        return None

    code, results = 0, []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for one, error in zip(ids, pool.map(remove, ids), strict=True):
            if error is None:
                results.append({"id": one, "removed": True})
                if not is_json:
                    done(one)
                continue
            code = code or exit_status(error)
            results.append({"id": one, "removed": False, "error": error.message})
            if not is_json:
                report(f"{one}: {error.message}")
    if is_json:
        json.dump(results, sys.stdout)
        print()
    return code
