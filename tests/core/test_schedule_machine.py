"""Whatever is submitted, cancelled, copied, expanded and shrunk, in whatever order: the books
stay right, every sequence ends with its own tokens, and all slots come back."""

from __future__ import annotations

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


class ScheduleMachine(RuleBasedStateMachine):
    """Random mail to a scheduler over random small memories."""

    @initialize(
        device_slots=st.integers(4, 12),
        host_slots=st.sampled_from([0, 1, 3, 8, 30]),
        streamed_limit=st.sampled_from([0, 0, 1, 5, 1000]),
        token_budget=st.sampled_from([1, 6, 16, 64]),
        max_running=st.sampled_from([1, 2, 5]),
        iterations_in_flight=st.sampled_from([1, 2]),
    )
    def build(self, iterations_in_flight, **memory):
        self.schedule = a_schedule(**memory)
        self.device = PerfectDevice(self.schedule, iterations_in_flight=iterations_in_flight)
        longest = memory["device_slots"] + memory["host_slots"] - SPARE_SLOTS
        self.longest = longest * BLOCK_TOKENS
        self.wanted: dict[int, int] = {}

    @rule(
        family=st.integers(0, 2),
        prompt_share=st.floats(0, 1),
        output_share=st.floats(0, 1),
        is_short=st.booleans(),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, 1]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def submit(self, family, prompt_share, output_share, is_short, n, priority, prompt_logprobs):
        """Prompts of one family begin alike, so that they share blocks."""
        longest = min(self.longest, 24) if is_short else self.longest
        prompt_len = 1 + int(prompt_share * (longest - 2))
        max_tokens = 1 + int(output_share * (longest - prompt_len - 1))
        sequences = self.device.submit(
            [family] * prompt_len,
            max_tokens,
            n=n,
            priority=priority,
            prompt_logprobs=prompt_logprobs,
        )
        self.wanted |= dict.fromkeys(sequences, max_tokens)
        self.starts = getattr(self, "starts", {}) | dict.fromkeys(sequences, prompt_len)
        self.device.plan_ahead()

    @precondition(lambda self: self.schedule.sequences)
    @rule(which=st.integers(0))
    def cancel(self, which):
        sequences = list(self.schedule.sequences)
        self.device.cancel(sequences[which % len(sequences)])
        self.device.plan_ahead()

    @precondition(lambda self: self.device.num_flying)
    @rule()
    def settle(self):
        self.device.settle()
        self.device.plan_ahead()

    @precondition(lambda self: self.device.swap_outs)
    @rule()
    def swapped_out(self):
        self.device.finish_swap_out()
        self.device.plan_ahead()

    @precondition(lambda self: self.device.swap_ins)
    @rule()
    def swapped_in(self):
        self.device.finish_swap_in()
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
        self.device.run()
        assert_all_returned(self.schedule)
        for sequence, max_tokens in self.wanted.items():
            tokens = self.device.outputs[sequence]
            start = self.starts[sequence]
            expected = [token_at(sequence, start + i) for i in range(len(tokens))]
            assert tokens == expected, f"sequence {sequence} got another's tokens"
            if self.device.ended[sequence] == "length":
                assert len(tokens) == max_tokens
            else:
                assert self.device.ended[sequence] == "cancelled"


TestScheduleMachine = ScheduleMachine.TestCase
TestScheduleMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
