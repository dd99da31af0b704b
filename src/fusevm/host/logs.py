"""Log lines: one JSON object each, on standard error. The event's name is what to search for; under systemd, in the
journal with every field (`wire.journald`).

Lines of libraries that use `logging` come out in the same shape.
"""

from __future__ import annotations

import logging
import os
import sys

import structlog

from fusevm.host.boundary import CutOff
from fusevm.wire.journald import choose_output


def configure_logging(level: int = logging.INFO) -> None:
    """Send everything to standard error as JSON; with its fields where that is the journal."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    printing = structlog.WriteLoggerFactory(file=sys.stderr)
    last, factory = choose_output(structlog.processors.JSONRenderer(), printing, "fuse-host", os.environ)
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_news)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


def _is_news(record: logging.LogRecord) -> bool:
    """Drop the server's traceback of an answer that we cut off ourselves: its reason was logged."""
    return not (record.exc_info and isinstance(record.exc_info[1], CutOff))
