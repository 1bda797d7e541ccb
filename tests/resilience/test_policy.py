"""When a dead engine is started again."""

from __future__ import annotations

import pytest

from pie_async.errors import ConfigError
from pie_async.resilience.policy import RestartPolicy


def test_each_restart_within_the_window_waits_twice_as_long_up_to_a_bound():
    policy = RestartPolicy(first_pause_s=0.5, longest_pause_s=3.0, most_restarts=5)
    deaths = [100.0, 101.0, 102.0, 103.0, 104.0]
    assert [policy.pause_s(deaths[: n + 1]) for n in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_it_gives_up_above_the_limit_but_old_deaths_do_not_count():
    policy = RestartPolicy(most_restarts=2, window_s=60.0, first_pause_s=1.0)
    assert policy.pause_s([0.0, 10.0, 20.0]) is None
    assert policy.pause_s([0.0, 10.0, 60.5]) == 2.0
    assert policy.pause_s([0.0, 10.0, 500.0]) == 1.0


def test_a_policy_without_restarts_gives_up_at_once():
    assert RestartPolicy(most_restarts=0).pause_s([1.0]) is None


def test_a_thousand_deaths_do_not_overflow_the_pause():
    policy = RestartPolicy(most_restarts=5000, window_s=1e9, longest_pause_s=7.0)
    assert policy.pause_s([float(at) for at in range(2000)]) == 7.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("silence_s", 0.0),
        ("window_s", float("nan")),
        ("first_pause_s", -1.0),
        ("most_restarts", -1),
        ("most_deaths_of_request", 1),
    ],
)
def test_policies_that_cannot_work_are_refused_by_name(option, value):
    with pytest.raises(ConfigError) as refused:
        RestartPolicy(**{option: value})
    assert refused.value.option == option
