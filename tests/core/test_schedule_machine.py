"""Whatever is submitted, cancelled, copied, expanded and shrunk, in whatever order: the books
stay right, every sequence ends with its own tokens, and all slots come back."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pie_async.core import invariants
from tests.support.perfect_device import (
    BLOCK_TOKENS,
    PerfectDevice,
    a_schedule,
    assert_all_returned,
    token_at,
)

SPARE_SLOTS = 3  # as assembly.longest_sequence leaves for a sequence alone


FAILURES = st.sampled_from([0, 0, 0, 1, 3, 1000])
"""Blocks of a command whose copies fail."""


class ScheduleMachine(RuleBasedStateMachine):
    """Random mail to a scheduler over random small memories."""

    @initialize(
        device_slots=st.integers(4, 12),
        host_slots=st.sampled_from([0, 1, 3, 8, 30]),
        streamed_limit=st.sampled_from([0, 0, 1, 5, 1000]),
        token_budget=st.sampled_from([1, 6, 16, 64]),
        max_running=st.sampled_from([1, 2, 5]),
        iterations_in_flight=st.sampled_from([1, 2]),
        shares_prefixes=st.sampled_from([True, True, True, False]),
        worth_awaiting_tokens=st.sampled_from([1, 8, 1000]),
    )
    def build(self, iterations_in_flight, worth_awaiting_tokens, **memory):
        self.schedule = a_schedule(**memory)
        self.schedule.sharing.worth_awaiting_tokens = worth_awaiting_tokens
        self.device = PerfectDevice(self.schedule, iterations_in_flight=iterations_in_flight)
        longest = memory["device_slots"] + memory["host_slots"] - SPARE_SLOTS
        self.longest = longest * BLOCK_TOKENS
        self.wanted: dict[int, int] = {}
        self.starts: dict[int, int] = {}

    @rule(
        family=st.integers(0, 2),
        prompt_share=st.floats(0, 1),
        output_share=st.floats(0, 1),
        is_short=st.booleans(),
        n=st.sampled_from([1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, 1]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        cache_salt=st.sampled_from([None, None, None, "a"]),
    )
    def submit(self, family, prompt_share, output_share, is_short, **options):
        """Prompts of one family begin alike, so that they share blocks."""
        longest = min(self.longest, 24) if is_short else self.longest
        prompt_len = 1 + int(prompt_share * (longest - 2))
        max_tokens = 1 + int(output_share * (longest - prompt_len - 1))
        sequences = self.device.submit([family] * prompt_len, max_tokens, **options)
        self.wanted |= dict.fromkeys(sequences, max_tokens)
        self.starts |= dict.fromkeys(sequences, prompt_len)
        self.device.plan_ahead()

    @precondition(lambda self: self.schedule.sequences)
    @rule(which=st.integers(0))
    def cancel(self, which):
        sequences = list(self.schedule.sequences)
        self.device.cancel(sequences[which % len(sequences)])
        self.device.plan_ahead()

    @precondition(lambda self: self.schedule.sequences)
    @rule(which=st.integers(0), is_read=st.booleans())
    def reading_changed(self, which, is_read):
        sequences = list(self.schedule.sequences)
        self.schedule.reading_changed([sequences[which % len(sequences)]], is_read=is_read)
        self.device.plan_ahead()

    @precondition(lambda self: self.device.num_flying)
    @rule(unstaged=FAILURES)
    def settle(self, unstaged):
        self.device.settle(unstaged=unstaged)
        self.device.plan_ahead()

    @precondition(lambda self: self.device.swap_outs)
    @rule(failed=FAILURES)
    def swapped_out(self, failed):
        self.device.finish_swap_out(failed=failed)
        self.device.plan_ahead()

    @precondition(lambda self: self.device.swap_ins)
    @rule(failed=FAILURES)
    def swapped_in(self, failed):
        self.device.finish_swap_in(failed=failed)
        self.device.plan_ahead()

    @rule(limit=st.sampled_from([0, 0, 1, 2, 6, 1000]))
    def expand_or_shrink(self, limit):
        self.schedule.streamed_limit = min(limit, self.schedule.residency.staging.size)
        self.device.plan_ahead()

    @rule(steps=st.integers(1, 20))
    def go_on(self, steps):
        for _ in range(steps):
            self.device.step()
        self.device.plan_ahead()

    @invariant()
    def books_are_right(self):
        if hasattr(self, "schedule"):
            invariants.check(self.schedule)

    def teardown(self):
        if not hasattr(self, "schedule"):
            return
        finish(self.device, self.starts, self.wanted)


def finish(device: PerfectDevice, starts: dict[int, int], wanted: dict[int, int]) -> None:
    """Drive on: every sequence ends, with its own tokens, and all slots return."""
    device.schedule.drain()  # also those that nobody reads
    device.run()
    assert_all_returned(device.schedule)
    for sequence, max_tokens in wanted.items():
        tokens, start = device.outputs[sequence], starts[sequence]
        expected = [token_at(sequence, start + i) for i in range(len(tokens))]
        assert tokens == expected, f"sequence {sequence} got another's tokens"
        if device.ended[sequence] == "length":
            assert len(tokens) == max_tokens
        else:
            assert device.ended[sequence] == "abort"


TestScheduleMachine = ScheduleMachine.TestCase
TestScheduleMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("hundred", range(2))
def test_long_random_histories_end_well(hundred: int):
    """Longer and more crowded than what the machine above draws."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        try:
            _random_history(random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def _failed(dice: random.Random, share: float) -> int:
    return dice.choice([1, 3, 1000]) if dice.random() < share else 0


def _random_history(dice: random.Random) -> None:
    history = _History(dice)
    happenings = [
        history.submit,
        history.cancel,
        history.change_reading,
        history.change_limit,
        history.go_on,
    ]
    device = history.device
    fails = dice.choice([0.0, 0.0, 0.05, 0.5])
    completions = [
        lambda: device.num_flying and device.settle(unstaged=_failed(dice, fails)),
        lambda: device.swap_outs and device.finish_swap_out(failed=_failed(dice, fails)),
        lambda: device.swap_ins and device.finish_swap_in(failed=_failed(dice, fails)),
    ]
    for _ in range(dice.choice([10, 40, 100])):
        weights = [3, 1, history.restlessness, 1, 2, 6, 4, 4]
        dice.choices(happenings + completions, weights)[0]()
        invariants.check(history.schedule)
        device.plan_ahead()
    finish(device, history.starts, history.wanted)


class _History:
    """What may happen to a scheduler over memories drawn from `dice`."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        device_slots, self._host_slots = dice.randint(4, 14), dice.choice([0, 1, 3, 8, 30])
        self.schedule = a_schedule(
            device_slots=device_slots,
            host_slots=self._host_slots,
            streamed_limit=dice.choice([0, 0, 1, 5, 1000]),
            token_budget=dice.choice([1, 6, 16, 64]),
            max_running=dice.choice([1, 2, 5]),
        )
        self.schedule.sharing.worth_awaiting_tokens = dice.choice([1, 8, 1000])
        self.device = PerfectDevice(self.schedule, iterations_in_flight=dice.choice([1, 2]))
        self.restlessness = dice.choice([0, 1, 4])
        """How often readers stop and go on."""
        self._longest = (device_slots + self._host_slots - SPARE_SLOTS) * BLOCK_TOKENS
        self.starts: dict[int, int] = {}
        self.wanted: dict[int, int] = {}

    def submit(self) -> None:
        dice = self._dice
        if len(self.schedule.sequences) >= 12:
            return
        most = min(self._longest, 24) if dice.random() < 0.7 else self._longest
        prompt_len = dice.randint(1, most - 1)
        max_tokens = dice.randint(1, most - prompt_len)
        prompt = [dice.randrange(3)] * prompt_len
        options = {"n": dice.choice([1, 1, 2, 3]), "priority": dice.choice([0, 0, 1])}
        options["cache_salt"] = dice.choice([None, None, "a"])
        for sequence in self.device.submit(prompt, max_tokens, **options):
            self.starts[sequence], self.wanted[sequence] = prompt_len, max_tokens

    def cancel(self) -> None:
        if self.schedule.sequences:
            self.device.cancel(self._dice.choice(list(self.schedule.sequences)))

    def change_reading(self) -> None:
        if self.schedule.sequences:
            some = self._dice.choices(list(self.schedule.sequences), k=self._dice.choice([1, 3]))
            self.schedule.reading_changed(some, is_read=self._dice.random() < 0.5)

    def change_limit(self) -> None:
        limit = self._dice.choice([0, 0, 1, 2, 6, 1000])
        self.schedule.streamed_limit = min(limit, self._host_slots)

    def go_on(self) -> None:
        for _ in range(self._dice.randint(1, 20)):
            self.device.step()
