"""Destroy several environments at the same time."""

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

    def remove(env_id: str) -> Error | None:
        try:
            fuse.environments.delete(env_id, wait=wait)
        except Error as error:
            return error
        return None

    code, results = 0, []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for env_id, error in zip(env_ids, pool.map(remove, env_ids), strict=True):
            if error is None:
                results.append({"id": env_id, "removed": True})
                if not is_json:
                    done(env_id)
                continue
            code = code or exit_status(error)
            results.append({"id": env_id, "removed": False, "error": error.message})
            if not is_json:
                report(f"{env_id}: {error.message}")
    if is_json:
        json.dump(results, sys.stdout)
        print()
    return code
