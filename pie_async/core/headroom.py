"""Adaptive expansion: how many blocks may be streamed (Pie, arXiv 2411.09317, section 5).

Starts at zero, grows only while somebody wants the room and the copies stay hidden, is cut
when the smoothed stall shows that they don't. What hides is bounded by the link's rate times
the compute time of a decode-only iteration *without stall*: an iteration made longer by stall
or by a prompt must not be taken for room, or streaming more would allow streaming more.
"""

from __future__ import annotations

import msgspec

from pie_async.messages import IterationObserved, LimitCause

BUSY_LINK = 0.5
"""Share of an iteration's time from which the link counts as the cause of stall. Below it a
stall comes from elsewhere (a copy thread that was scheduled late), and streaming less would
cost more than it saves."""
LONG_STALL = 0.2
"""Smoothed stall that is cut whatever its cause."""
LINK_SHARE = 0.95
"""Part of the link's time that staging may fill."""
STALL_TOLERANCE = 0.01
"""Stall per compute time, smoothed, up to which swaps count as hidden: above what a late
wake-up costs now and then, below what anybody would notice. An H200 stalls for 0.15 % of the time
while three quarters of its PCIe link are busy, for 1.1 % at 93 % and for 1.9 % at 98 %."""
FIRST_STEP_BLOCKS = 4
"""What is tried before the link's rate has been seen."""
KNOWN_STEP = 0.25
"""Share of the bound that is allowed at once when link and iteration have been measured."""
HEADROOM_SHARE = 0.5
"""Expand while more than this part of the limit is wanted."""
CAREFUL_FROM = 0.8
"""Share of the bound up to which the limit doubles; above it grows by one twentieth."""
COOLDOWN_ITERATIONS = 16
"""No change for this long after a cut: it takes effect a few iterations later."""
SMOOTHING = 0.2
"""Weight of a new measurement in the running averages."""
SHRINKING = 0.01
"""Its weight where a decode-only iteration was shorter. When sequences are parked the batch, and
what hides behind it, shrinks for seconds; a limit that followed would have more of them parked.
Should iterations stay short, stall says so first."""
STAGING_TRAFFIC = 1.6
"""Bytes of device memory traffic that staging a byte costs, beside attention's reading of it."""
CUT = 0.95
"""At most this part of what was streamed when it stalled is allowed again."""


class PhaseCost(msgspec.Struct, frozen=True, kw_only=True):
    """What iterations of one kind cost, smoothed: those that only decode, or those with prompts."""

    compute_s: float = 0.0
    """Without stall; 0 until one ran."""
    stall_share: float = 0.0
    """Stall per compute time."""
    busy_share: float = 0.0
    """Part of the iteration's time that the link was busy staging."""

    @property
    def is_stalled_by_link(self) -> bool:
        return self.stall_share > STALL_TOLERANCE and self.busy_share >= BUSY_LINK


class Expansion(msgspec.Struct, frozen=True, kw_only=True):
    """What the governor knows and what it allows."""

    block_bytes: int
    most_blocks: int
    """Never allow more: slots of the staging ring and of the host pool."""
    limit_blocks: int = 0
    link_bytes_per_s: float = 0.0
    """Measured; 0 until something was copied."""
    itl_limit_s: float | None = None
    """What an iteration that only decodes may take; None: as long as it likes."""
    decode_floor_s: float = 0.0
    """No iteration is shorter, as far as the device is known; 0: unknown."""
    decode: PhaseCost = PhaseCost()
    """Of iterations that only decode: what streaming has to hide behind."""
    prefill: PhaseCost = PhaseCost()
    """Of iterations with prompts and sequences that decode."""
    resident_blocks: int = 0
    """In use on the device."""
    block_s: float = 0.0
    """What one more block, resident or streamed, adds to a decode-only iteration, smoothed."""
    stall_share: float = 0.0
    """Stall per compute time of all iterations, smoothed."""
    cooldown: int = 0
    cause: LimitCause = "idle"
    reason: str = "nothing is streamed yet"

    @property
    def is_measured(self) -> bool:
        """Link and iteration are known, the latter at least from below: while prompts keep
        coming no iteration may be decode-only for a long time."""
        return self.link_bytes_per_s > 0 and self.hiding_s > 0

    @property
    def hiding_s(self) -> float:
        """What staging may take in an iteration at most."""
        return self.decode.compute_s or self.decode_floor_s

    @property
    def bound_blocks(self) -> int:
        """Blocks whose staging hides behind a decode-only iteration."""
        if not self.is_measured:
            return min(self.limit_blocks + FIRST_STEP_BLOCKS, self.timely_blocks)
        hidden = LINK_SHARE * self.link_bytes_per_s * self.hiding_s / self.block_bytes
        return min(int(hidden), self.timely_blocks)

    @property
    def timely_blocks(self) -> int:
        """Blocks that may be streamed for the ITL limit's sake: what is streamed is read by
        sequences that would not run without it, and each of them makes iterations longer."""
        if self.itl_limit_s is None:
            return self.most_blocks
        if not self.block_s:
            return 0  # nothing that only decoded has been seen: nobody knows what it would cost
        in_all = (self.itl_limit_s - self.decode_floor_s) / self.block_s
        return max(0, min(int(in_all) - self.resident_blocks, self.most_blocks))


def pays(*, weight_bytes: int, resident_bytes: int) -> bool:
    """Whether streaming can bring throughput, however fast the link is.

    An iteration reads the weights W, the resident KV R and the streamed KV S once, and staging
    costs c = `STAGING_TRAFFIC` times S more: its time is as W + R + (1 + c) S. The batch, and
    so its tokens, is as R + S. Tokens per time, (R + S) / (W + R + (1 + c) S), grow with S
    only if W + R > (1 + c) R, that is if W > c R.

    Args:
        weight_bytes: W, on the device that reads them.
        resident_bytes: R, all of the device's KV slots.
    """
    return weight_bytes > STAGING_TRAFFIC * resident_bytes


def decide(state: Expansion, seen: IterationObserved) -> Expansion:
    """The new state after an iteration: expand, hold or shrink.

    A change shows in `limit_blocks`, why in `cause` and `reason`.
    """
    state = _measure(state, seen)
    if not state.most_blocks:
        return _set(state, 0, "cost", "streaming would cost more than it brings")
    if state.cooldown:
        return msgspec.structs.replace(state, cooldown=state.cooldown - 1)
    if seen.streamed_blocks and _stalls(state):
        return _shrink_on_stall(state, seen)
    bound = state.bound_blocks
    if state.limit_blocks > bound and state.is_measured:
        return _set(state, bound, _bound_cause(state), _why(state))
    if seen.wanted_blocks == 0 and seen.streamed_blocks == 0:
        return _set(state, 0, "fits", "everything fits on the device")
    if seen.wanted_blocks > HEADROOM_SHARE * state.limit_blocks and bound > state.limit_blocks:
        return _expand(state, seen.wanted_blocks, bound)
    return state


def _stalls(state: Expansion) -> bool:
    is_links_doing = state.decode.is_stalled_by_link or state.prefill.is_stalled_by_link
    return state.stall_share > (STALL_TOLERANCE if is_links_doing else LONG_STALL)


def _measure(state: Expansion, seen: IterationObserved) -> Expansion:
    link, block_s = state.link_bytes_per_s, state.block_s
    decode, prefill = state.decode, state.prefill
    if seen.staged_bytes and seen.staging_busy_s > 0:
        link = _blend(link, seen.staged_bytes / seen.staging_busy_s)
    if seen.prefill_tokens:
        prefill = _phase_cost(prefill, seen)
    elif seen.decode_rows:
        decode = _phase_cost(decode, seen)
        blocks = seen.resident_blocks + seen.streamed_blocks
        if blocks:
            # With the stall: a client waits for that too.
            took_s = seen.compute_s + seen.stall_s - state.decode_floor_s
            block_s = _blend(block_s, max(took_s, 0.0) / blocks)
    stall_share = seen.stall_s / max(seen.compute_s, 1e-9)
    return msgspec.structs.replace(
        state,
        link_bytes_per_s=link,
        decode=decode,
        prefill=prefill,
        resident_blocks=seen.resident_blocks,
        block_s=block_s,
        stall_share=state.stall_share + SMOOTHING * (stall_share - state.stall_share),
    )


def _phase_cost(cost: PhaseCost, seen: IterationObserved) -> PhaseCost:
    """With one more iteration of its kind."""
    compute_s = max(seen.compute_s, 1e-9)
    stall_share = seen.stall_s / compute_s
    busy_share = seen.staging_busy_s / (compute_s + seen.stall_s)
    weight = SHRINKING if seen.compute_s < cost.compute_s else SMOOTHING
    return PhaseCost(
        compute_s=_blend(cost.compute_s, seen.compute_s, weight),
        stall_share=cost.stall_share + SMOOTHING * (stall_share - cost.stall_share),
        busy_share=cost.busy_share + SMOOTHING * (busy_share - cost.busy_share),
    )


def _bound_cause(state: Expansion) -> LimitCause:
    """What makes the bound."""
    is_timed = state.itl_limit_s is not None and state.bound_blocks == state.timely_blocks
    return "itl" if is_timed else "hiding"


def _why(state: Expansion) -> str:
    """What the bound is made of."""
    if _bound_cause(state) == "itl":
        return f"{state.bound_blocks} blocks keep iterations within {state.itl_limit_s:.4g} s"
    return f"{state.bound_blocks} blocks hide behind a {state.hiding_s:.4g} s decode"


def _blend(old: float, new: float, weight: float = SMOOTHING) -> float:
    return new if not old else old + weight * (new - old)


def _expand(state: Expansion, wanted: int, bound: int) -> Expansion:
    """Quickly at first, then carefully.

    The limit is a permission, not an order, so it may run ahead of what is wanted now: a
    sequence that needs its next block then finds it granted.
    """
    careful_from = max(int(CAREFUL_FROM * bound), FIRST_STEP_BLOCKS)
    if state.limit_blocks < careful_from:
        grown = max(2 * state.limit_blocks, FIRST_STEP_BLOCKS)
        if state.is_measured:
            grown = max(grown, int(KNOWN_STEP * bound))
        grown = min(grown, careful_from)
    else:
        grown = state.limit_blocks + max(1, bound // 20)
    limit = min(grown, bound)
    is_at_bound = state.is_measured and limit == bound
    cause: LimitCause = _bound_cause(state) if is_at_bound else "demand"
    return _set(state, limit, cause, f"{wanted} blocks wanted, {bound} would stay hidden")


def _shrink_on_stall(state: Expansion, seen: IterationObserved) -> Expansion:
    """Allow what would have fitted into the time without the stall, and wait to see."""
    fitting = int(seen.streamed_blocks * min(CUT, 1 / (1 + state.stall_share)))
    reason = f"compute stalled {state.stall_share:.1%} of its time"
    state = _set(state, min(state.limit_blocks, fitting), "stall", reason)
    return msgspec.structs.replace(
        state,
        cooldown=COOLDOWN_ITERATIONS,
        stall_share=0.0,
        decode=msgspec.structs.replace(state.decode, stall_share=0.0),
        prefill=msgspec.structs.replace(state.prefill, stall_share=0.0),
    )


def _set(state: Expansion, limit: int, cause: LimitCause, reason: str) -> Expansion:
    if (limit, cause) == (state.limit_blocks, state.cause):
        return state
    return msgspec.structs.replace(state, limit_blocks=limit, cause=cause, reason=reason)
