"""The expansion policy, iteration by iteration, against a link and a decode time it can't see."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from pie_async.core.headroom import (
    CAREFUL_FROM,
    COOLDOWN_ITERATIONS,
    FIRST_STEP_BLOCKS,
    KNOWN_STEP,
    LINK_SHARE,
    STAGING_TRAFFIC,
    Expansion,
    decide,
    pays,
)
from pie_async.ids import IterationId
from pie_async.messages import IterationObserved

BLOCK_BYTES = 2**20
LINK = 50e9
DECODE_S = 7e-3
HIDDEN = int(LINK_SHARE * LINK * DECODE_S / BLOCK_BYTES)  # 317 blocks


def fresh(most_blocks: int = 10_000) -> Expansion:
    return Expansion(block_bytes=BLOCK_BYTES, most_blocks=most_blocks)


def seen(**changes) -> IterationObserved:
    base = IterationObserved(
        iteration=IterationId(1),
        compute_s=DECODE_S,
        stall_s=0.0,
        staged_bytes=0,
        staging_busy_s=0.0,
        decode_rows=8,
        prefill_tokens=0,
        resident_blocks=0,
        streamed_blocks=0,
        wanted_blocks=0,
    )
    return msgspec.structs.replace(base, **changes)


def iteration(
    state: Expansion,
    *,
    wanted: int,
    link: float = LINK,
    decode_s: float = DECODE_S,
    prefill_tokens: int = 0,
    prefill_s: float = 0.0,
) -> IterationObserved:
    """An iteration that streams all it may: longer than its work only by what doesn't hide."""
    streamed = min(state.limit_blocks, wanted)
    staged = streamed * BLOCK_BYTES
    compute_s = decode_s + prefill_s
    return seen(
        compute_s=compute_s,
        stall_s=max(0.0, staged / link - compute_s),
        staged_bytes=staged,
        staging_busy_s=staged / link,
        prefill_tokens=prefill_tokens,
        resident_blocks=0,
        streamed_blocks=streamed,
        wanted_blocks=wanted,
    )


def run(state: Expansion, count: int, **conditions) -> list[Expansion]:
    states = []
    for _ in range(count):
        state = decide(state, iteration(state, **conditions))
        states.append(state)
    return states


def test_it_starts_at_zero_and_stays_there_while_everything_fits():
    assert fresh().limit_blocks == 0
    assert {state.limit_blocks for state in run(fresh(), 100, wanted=0)} == {0}


def test_it_expands_only_when_somebody_wants_room_and_only_as_far():
    assert run(fresh(), 1, wanted=500)[0].limit_blocks == FIRST_STEP_BLOCKS
    for wanted in (20, 60, 200):
        states = run(fresh(), 200, wanted=wanted)
        assert wanted <= states[-1].limit_blocks <= max(2 * 2 * wanted, KNOWN_STEP * HIDDEN)
        assert states[-1].limit_blocks <= HIDDEN
        assert states[-1].limit_blocks == states[-50].limit_blocks, "it still hunts"


def test_it_grows_quickly_first_and_carefully_near_the_bound():
    limits = [state.limit_blocks for state in run(fresh(), 60, wanted=5000)]
    careful_from = int(CAREFUL_FROM * HIDDEN)
    quick = [b / a for a, b in itertools.pairwise(limits) if b < careful_from]
    assert all(ratio >= 2 for ratio in quick)
    reached = next(i for i, limit in enumerate(limits) if limit >= careful_from)
    assert reached <= 10
    careful = [b - a for a, b in itertools.pairwise(limits[reached:])]
    assert max(careful) <= HIDDEN // 20


def test_it_settles_at_what_the_link_hides_behind_a_decode_iteration():
    states = run(fresh(), 200, wanted=5000)
    assert states[-1].limit_blocks == pytest.approx(HIDDEN, abs=1)
    assert all(s.limit_blocks * BLOCK_BYTES / LINK <= DECODE_S for s in states)


def test_it_never_allows_more_than_there_are_slots():
    assert run(fresh(most_blocks=37), 200, wanted=5000)[-1].limit_blocks == 37


def test_a_stall_cuts_below_what_was_streamed_and_stops_growth_for_a_while():
    state = run(fresh(), 100, wanted=5000)[-1]
    before = state.limit_blocks
    state = decide(state, iteration(state, wanted=5000, link=LINK / 2))
    assert state.limit_blocks <= 0.9 * before
    assert "stall" in state.reason
    held = run(state, COOLDOWN_ITERATIONS, wanted=5000)
    assert {s.limit_blocks for s in held} == {state.limit_blocks}
    assert decide(held[-1], iteration(held[-1], wanted=5000)).cooldown == 0


def test_the_same_stall_seen_again_by_iterations_in_flight_does_not_cut_twice():
    state = run(fresh(), 100, wanted=5000)[-1]
    stalled = iteration(state, wanted=5000, link=LINK / 2)
    once = decide(state, stalled)
    assert decide(once, stalled).limit_blocks == once.limit_blocks


def test_a_stall_of_rounding_size_is_no_stall():
    state = run(fresh(), 100, wanted=5000)[-1]
    stalled = msgspec.structs.replace(iteration(state, wanted=5000), stall_s=DECODE_S / 1000)
    assert decide(state, stalled).limit_blocks >= state.limit_blocks


def test_a_stall_without_streaming_is_not_its_business():
    state = run(fresh(), 20, wanted=100)[-1]
    after = decide(state, seen(stall_s=1.0, wanted_blocks=100))
    assert after.limit_blocks == state.limit_blocks


def test_long_prompts_are_not_taken_for_room():
    """The trap: an iteration that a prompt made 20 times longer would hide 20 times more."""
    state = run(fresh(), 100, wanted=50_000)[-1]
    prefill = {"prefill_tokens": 4096, "prefill_s": 20 * DECODE_S}
    for _ in range(50):
        state = decide(state, iteration(state, wanted=50_000, **prefill))
        assert state.limit_blocks <= HIDDEN
        state = decide(state, iteration(state, wanted=50_000))
        assert state.limit_blocks <= HIDDEN


def test_stalls_are_not_taken_for_room():
    """The other half of the trap: longer because it stalled must not mean longer allowed."""
    state = fresh()
    limits = []
    for number in range(400):
        link = LINK if number % 3 else LINK / 3  # every third iteration finds the link busy
        state = decide(state, iteration(state, wanted=50_000, link=link))
        limits.append(state.limit_blocks)
    assert max(limits) <= HIDDEN
    assert state.decode.compute_s == pytest.approx(DECODE_S)


def test_prompts_alone_teach_nothing_about_decoding():
    state = decide(fresh(), seen(decode_rows=0, prefill_tokens=512, compute_s=1.0))
    assert state.decode.compute_s == 0
    state = decide(state, seen(decode_rows=3, prefill_tokens=512, compute_s=1.0))
    assert state.decode.compute_s == 0


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_it_follows_the_links_rate(factor: float):
    state = run(fresh(), 200, wanted=50_000)[-1]
    state = run(state, 1000, wanted=50_000, link=LINK * factor)[-1]
    assert state.link_bytes_per_s == pytest.approx(LINK * factor, rel=0.01)
    assert state.limit_blocks == pytest.approx(HIDDEN * factor, rel=0.12)


def test_it_shrinks_when_decoding_gets_faster():
    """Fewer rows in the batch hide less."""
    state = run(fresh(), 200, wanted=50_000)[-1]
    states = run(state, 300, wanted=50_000, decode_s=DECODE_S / 2)
    assert states[-1].limit_blocks == pytest.approx(HIDDEN / 2, rel=0.12)


def test_it_returns_to_zero_when_everything_fits_again():
    state = run(fresh(), 100, wanted=500)[-1]
    assert state.limit_blocks > 0
    states = run(state, 2, wanted=0)
    assert states[-1].limit_blocks == 0
    assert "fits" in states[-1].reason


def test_it_says_why_at_every_change():
    state, changes = fresh(), []
    for number in range(120):
        link = LINK / 2 if number == 60 else LINK
        after = decide(state, iteration(state, wanted=500 if number < 90 else 0, link=link))
        if after.limit_blocks != state.limit_blocks:
            changes.append(after.reason)
        state = after
    assert len(changes) > 5
    assert all(changes)
    assert any("stalled" in reason for reason in changes)


def test_while_prompts_keep_coming_the_device_s_own_bound_stands_for_a_decode_iteration():
    floor_s = 0.8 * DECODE_S
    state = msgspec.structs.replace(fresh(), decode_floor_s=floor_s)
    for _ in range(8):
        state = decide(state, iteration(state, wanted=1000, prefill_tokens=500, prefill_s=0.02))
    assert state.decode.compute_s == 0
    hidden = int(LINK_SHARE * LINK * floor_s / BLOCK_BYTES)
    assert CAREFUL_FROM * hidden - 1 <= state.limit_blocks <= hidden
    state = decide(state, iteration(state, wanted=1000))
    assert state.bound_blocks == HIDDEN


# --- a limit in time --------------------------------------------------------------------------

RESIDENT = 400
FLOOR_S, BLOCK_S = 5e-3, 5e-6
"""Of a device on which an iteration takes 7 ms with the resident blocks alone."""


def timed(state: Expansion, wanted: int, **changes) -> IterationObserved:
    """What is streamed is read by sequences of its own: iterations grow with it."""
    streamed = min(state.limit_blocks, wanted)
    staged = streamed * BLOCK_BYTES
    return seen(
        compute_s=FLOOR_S + (RESIDENT + streamed) * BLOCK_S,
        staged_bytes=staged,
        staging_busy_s=staged / LINK,
        resident_blocks=RESIDENT,
        streamed_blocks=streamed,
        wanted_blocks=wanted,
        **changes,
    )


@pytest.mark.parametrize("floor_s", [FLOOR_S, 0.0], ids=["floor-known", "floor-unknown"])
def test_no_more_is_streamed_than_keeps_iterations_within_the_limit(floor_s):
    limit_s = 7.5e-3
    state = msgspec.structs.replace(fresh(), itl_limit_s=limit_s, decode_floor_s=floor_s)
    for _ in range(200):
        observed = timed(state, wanted=1000)
        assert observed.compute_s <= limit_s
        state = decide(state, observed)
    fits = (limit_s - FLOOR_S) / BLOCK_S - RESIDENT
    assert state.limit_blocks <= fits
    assert state.limit_blocks >= (0.9 * fits if floor_s else 1)
    if floor_s:
        assert state.bound_blocks == state.timely_blocks < HIDDEN


def test_an_iteration_that_is_too_long_without_streaming_leaves_nothing_to_stream():
    state = msgspec.structs.replace(fresh(), itl_limit_s=6e-3, decode_floor_s=FLOOR_S)
    for _ in range(50):
        state = decide(state, timed(state, wanted=1000))
    assert state.limit_blocks == 0


def test_until_a_decode_iteration_was_seen_a_limit_in_time_allows_nothing():
    state = msgspec.structs.replace(fresh(), itl_limit_s=1.0, decode_floor_s=FLOOR_S)
    for _ in range(50):
        state = decide(state, timed(state, wanted=1000, prefill_tokens=100))
    assert state.limit_blocks == 0
    for _ in range(50):
        state = decide(state, timed(state, wanted=1000))
    assert state.limit_blocks > HIDDEN // 2


def test_longer_sequences_take_room_from_streaming_and_the_reason_is_told():
    state = msgspec.structs.replace(fresh(), itl_limit_s=7.5e-3, decode_floor_s=FLOOR_S)
    for _ in range(100):
        state = decide(state, timed(state, wanted=1000))
    before = state.limit_blocks
    for _ in range(60):
        longer = msgspec.structs.replace(timed(state, wanted=1000), resident_blocks=RESIDENT + 40)
        longer = msgspec.structs.replace(longer, compute_s=longer.compute_s + 40 * BLOCK_S)
        state = decide(state, longer)
    assert before - 50 <= state.limit_blocks <= before - 30
    assert "within 0.0075 s" in state.reason
    assert state.cause == "itl"


# --- a batch that shrinks for a moment ------------------------------------------------------


def test_a_batch_that_is_short_for_a_moment_costs_little_of_the_limit():
    """As when a sequence is parked: the limit must not fall below what is streamed and have
    the next one parked."""
    state = run(fresh(), 200, wanted=50_000)[-1]
    short = seen(compute_s=DECODE_S / 2, streamed_blocks=HIDDEN // 2, wanted_blocks=50_000)
    before = state.limit_blocks
    for _ in range(10):
        state = decide(state, short)
    assert 0.9 * before < state.limit_blocks < before


def test_iterations_that_become_longer_are_taken_for_room_soon():
    state = run(fresh(), 200, wanted=50_000)[-1]
    states = run(state, 30, wanted=50_000, decode_s=1.5 * DECODE_S)
    assert states[-1].limit_blocks > 1.3 * state.limit_blocks


# --- whether streaming can pay --------------------------------------------------------------


def throughput(weights: float, resident: float, streamed: float) -> float:
    """Sequences, as their KV, per time of an iteration that moves bytes and nothing else."""
    moved = weights + resident + (1 + STAGING_TRAFFIC) * streamed
    return (resident + streamed) / moved


@pytest.mark.parametrize("weights", [5, 12, 15, 17, 24, 65])
@pytest.mark.parametrize("streamed", [0.1, 3.0])
def test_streaming_pays_where_more_of_it_raises_throughput(weights: int, streamed: float):
    resident = 10
    gains = throughput(weights, resident, streamed) > throughput(weights, resident, 0)
    assert pays(weight_bytes=weights, resident_bytes=resident) == gains


# --- causes, and the two kinds of iterations --------------------------------------------------


def test_every_limit_has_a_cause():
    state = run(fresh(), 3, wanted=50_000)[-1]
    assert state.cause == "demand"
    assert run(state, 200, wanted=50_000)[-1].cause == "hiding"
    assert run(state, 200, wanted=0)[-1].cause == "fits"
    assert run(fresh(most_blocks=0), 1, wanted=50_000)[-1].cause == "cost"


def test_a_change_of_cause_at_the_same_limit_is_told():
    state = decide(fresh(), seen())
    assert (state.limit_blocks, state.cause) == (0, "fits")


def test_what_prompts_cost_is_kept_apart_from_what_decoding_costs():
    state = fresh()
    for number in range(100):
        with_prompt = {"prefill_tokens": 512, "compute_s": 0.05, "stall_s": 0.0}
        only_decodes = {"compute_s": DECODE_S, "stall_s": DECODE_S / 100}
        shares = with_prompt if number % 2 else only_decodes
        state = decide(state, seen(staging_busy_s=0.006, staged_bytes=BLOCK_BYTES, **shares))
    assert state.decode.compute_s == pytest.approx(DECODE_S)
    assert state.decode.stall_share == pytest.approx(0.01, rel=1e-3)
    assert state.decode.busy_share == pytest.approx(0.006 / (1.01 * DECODE_S), rel=1e-3)
    assert state.prefill.compute_s == pytest.approx(0.05)
    assert state.prefill.stall_share == 0
    assert state.prefill.busy_share == pytest.approx(0.12, rel=1e-3)


def test_stall_behind_a_full_link_is_seen_between_iterations_in_which_it_is_idle():
    """Long prompts leave the link idle for most of the time, decoding between them stalls on it:
    on the average of both it would look as if the cause were elsewhere."""
    state = run(fresh(), 200, wanted=50_000)[-1]
    before = state.limit_blocks
    for number in range(40):
        if number % 2:
            one = {"prefill_tokens": 4096, "compute_s": 0.05, "staging_busy_s": 0.008}
        else:
            one = {"compute_s": DECODE_S, "stall_s": 0.15 * DECODE_S, "staging_busy_s": 0.008}
        state = decide(state, seen(streamed_blocks=before, wanted_blocks=50_000, **one))
    assert state.limit_blocks < before
    assert state.cause == "stall"
