"""Every error that the package raises on purpose has one status, and its type is OpenAI's."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pie_async import errors
from pie_async.api.prometheus import Durations
from pie_async.openai.errors import error_reply

STATUSES = {
    errors.InvalidRequest: 400,
    errors.ContextTooLong: 400,
    errors.GuideFailed: 422,
    errors.Overloaded: 429,
    errors.EngineStopped: 503,
    errors.EngineStuck: 503,
    errors.DeviceFault: 503,
    errors.SequenceLost: 503,
    # never a client's to see: a caller's mistakes, and bugs
    errors.PieError: 500,
    errors.ConfigError: 500,
    errors.ModelError: 500,
    errors.UnsupportedModel: 500,
    errors.WeightsError: 500,
    errors.MailboxClosed: 500,
    errors.MailboxFull: 500,
}


def test_no_error_is_without_a_status() -> None:
    kinds = {each for each in vars(errors).values() if isinstance(each, type)}
    assert {each for each in kinds if issubclass(each, errors.PieError)} == set(STATUSES)


@pytest.mark.parametrize("kind", STATUSES, ids=lambda kind: kind.__name__)
def test_its_status_and_type(kind: type[errors.PieError]) -> None:
    error = kind("feature", "text") if kind is errors.UnsupportedModel else kind("text")
    reply = error_reply(error)
    assert reply.status == STATUSES[kind]
    is_clients = reply.status < 500
    assert (reply.detail.type in ("invalid_request_error", "rate_limit_error")) == is_clients
    assert ("text" in reply.detail.message) == (
        reply.status != 500 and kind is not errors.DeviceFault
    )
    assert ("Retry-After" in reply.headers) == (reply.status in (429, 503))


def test_durations_are_counted_in_cumulative_buckets() -> None:
    durations = Durations("pie:wait_seconds", "Waits", (0.5, 1))
    for duration_s in (0.1, 0.5, 0.7, 9.0):
        durations.observe(duration_s)
    registry = CollectorRegistry()
    registry.register(durations)
    text = generate_latest(registry).decode()
    for bound, count in (("0.5", 2), ("1.0", 3), ("+Inf", 4)):
        assert f'pie:wait_seconds_bucket{{le="{bound}"}} {count}.0' in text
    assert "pie:wait_seconds_count 4.0" in text
    assert "pie:wait_seconds_sum 10.3" in text
