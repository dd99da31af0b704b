"""Every host, and quiet logs."""

import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

sys.path.insert(0, str(Path(__file__).parent))

from host_makers import EVERY, Hosted


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)


@pytest_asyncio.fixture(params=EVERY, ids=lambda make: make.__name__)
async def hosted(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Hosted]:
    async with request.param(tmp_path) as host:
        yield host
