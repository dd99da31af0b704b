"""An order to a machine's task, and those who wait for its outcome."""

from __future__ import annotations

import asyncio

from fusevm.model.machine import Machine


class Order:
    """Something for the task to do. Any number of callers may wait for its outcome."""

    def __init__(self) -> None:
        self._outcome: asyncio.Future[Machine] = asyncio.get_running_loop().create_future()

    async def wait(self) -> Machine:
        """Return the machine's record when the order is carried out; raise what it raised. Cancel-safe."""
        return await asyncio.shield(self._outcome)

    def succeed(self, machine: Machine) -> None:
        """Tell those who wait."""
        if not self._outcome.done():
            self._outcome.set_result(machine)

    def fail(self, error: BaseException) -> None:
        """Tell those who wait; nobody has to."""
        if not self._outcome.done():
            self._outcome.set_exception(error)
            self._outcome.exception()
