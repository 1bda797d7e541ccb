"""Log lines that machines read."""

from __future__ import annotations

import json
import logging

from pie_async.openai.answer import log_failure
from pie_async.runtime.logs import JsonLines


def lines(caplog) -> list[dict]:
    told = [JsonLines().format(record) for record in caplog.records]
    assert not any("\n" in line for line in told)
    return [json.loads(line) for line in told]


def test_a_failed_request_is_a_line_with_its_id_and_the_traceback(caplog) -> None:
    def fail() -> None:
        raise RuntimeError("two\nlines")

    try:
        fail()
    except RuntimeError as error:
        log_failure(error, "req_7")
    (line,) = lines(caplog)
    assert line["request_id"] == "req_7"
    assert (line["level"], line["logger"]) == ("error", "pie_async.openai.answer")
    assert line["text"] == "request req_7 failed: two\nlines"
    assert "RuntimeError" in line["traceback"] and __file__ in line["traceback"]


def test_others_have_a_time_and_no_more_than_there_is(caplog) -> None:
    logging.getLogger("pie_async").warning("the pool is %s", "short")
    (line,) = lines(caplog)
    assert line.keys() == {"at", "level", "logger", "text"}
    assert line["text"] == "the pool is short" and line["at"].endswith("+00:00")


def test_half_a_character_can_be_written_down() -> None:
    text = "half \ud800"
    record = logging.LogRecord("pie_async", logging.ERROR, __file__, 1, text, None, None)
    written = JsonLines().format(record)
    assert written.isascii() and json.loads(written)["text"] == text
