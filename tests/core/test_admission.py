"""Who is let in, and when the others are told to come again."""

from __future__ import annotations

import pytest

from pie_async.core.admission import LEAST_S, MOST_S, UNKNOWN_S, Admission
from pie_async.errors import Overloaded


def full(*, most_requests: int = 10) -> Admission:
    admission = Admission(most_requests=most_requests, most_tokens=1000)
    for _ in range(most_requests):
        admission.check(now_s=0.0, num_tokens=5)
        admission.enter(5)
    return admission


def refusal(admission: Admission, now_s: float, num_tokens: int = 0) -> float:
    with pytest.raises(Overloaded) as refused:
        admission.check(now_s=now_s, num_tokens=num_tokens)
    return refused.value.retry_after_s


def serve(admission: Admission, *, every_s: float, times: int, from_s: float = 0.0) -> float:
    """Requests end and others take their places; when the last one did."""
    for number in range(1, times + 1):
        admission.leave(5, now_s=from_s + number * every_s)
        admission.enter(5)
    return from_s + times * every_s


def test_the_next_one_is_refused_and_a_place_that_becomes_free_is_given_away_once():
    admission = full()
    assert refusal(admission, 0.0) == UNKNOWN_S
    admission.leave(5, now_s=1.0)
    admission.check(now_s=1.0)
    admission.enter(5)
    refusal(admission, 1.0)


@pytest.mark.parametrize("every_s", [2.0, 5.0])
def test_each_is_told_when_a_place_for_it_will_have_become_free(every_s):
    admission = full()
    now_s = serve(admission, every_s=every_s, times=20)
    told = [refusal(admission, now_s) for _ in range(5)]
    assert told == pytest.approx([every_s * (n + 1) for n in range(5)], rel=0.1)


def test_those_who_were_refused_long_ago_are_not_waited_for():
    admission = full()
    now_s = serve(admission, every_s=2.0, times=20)
    for _ in range(50):
        refusal(admission, now_s)
    now_s = serve(admission, every_s=2.0, times=100, from_s=now_s)
    assert refusal(admission, now_s) == pytest.approx(2.0, rel=0.1)


def test_what_has_stopped_ending_things_has_become_slow():
    admission = full()
    now_s = serve(admission, every_s=0.1, times=60)
    assert refusal(admission, now_s) == LEAST_S
    assert refusal(admission, now_s + 600.0) > 10 * LEAST_S


def test_what_is_told_is_bounded():
    admission = full(most_requests=1)
    now_s = serve(admission, every_s=1e-6, times=100)
    assert refusal(admission, now_s) == LEAST_S
    now_s = serve(admission, every_s=1000.0, times=64, from_s=now_s)
    assert refusal(admission, now_s) == MOST_S


def test_tokens_count_but_one_request_alone_may_have_more():
    admission = Admission(most_requests=10, most_tokens=1000)
    admission.check(now_s=0.0, num_tokens=5000)
    admission.enter(5000)
    refusal(admission, 0.0, num_tokens=1)
    admission.leave(5000, now_s=1.0)
    admission.enter(990)
    admission.check(now_s=1.0, num_tokens=10)
    refusal(admission, 1.0, num_tokens=11)
    assert (admission.num_requests, admission.num_tokens) == (1, 990)
