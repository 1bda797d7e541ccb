"""Log lines on standard error, for people or for machines. Commands alone choose: an application
that embeds an engine has its own way to log."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal, get_args

LogFormat = Literal["text", "json"]
FORMATS: tuple[str, ...] = get_args(LogFormat)


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with the id of its request where one is at fault."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "text": record.getMessage(),
        }
        if (request := getattr(record, "request_id", None)) is not None:
            line["request_id"] = request
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as(style: str) -> None:
    """Warnings and errors go to standard error in this format, unless somebody already listens."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonLines()
        if style == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
