"""Client library of Fuse: `Fuse` (synchronous) and `AsyncFuse` over one sans-I/O core.

    from fusevm.sdk import Fuse

The names are loaded on first use, so that a program pays only for the half it needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusevm.sdk.aio import AsyncFuse
    from fusevm.sdk.client import Fuse

__all__ = ["AsyncFuse", "Fuse"]


def __getattr__(name: str) -> Any:
    if name == "Fuse":
        from fusevm.sdk.client import Fuse  # noqa: PLC0415 - see above

        return Fuse
    if name == "AsyncFuse":
        from fusevm.sdk.aio import AsyncFuse  # noqa: PLC0415 - see above

        return AsyncFuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
