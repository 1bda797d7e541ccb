"""Adaptive expansion: how many blocks may be streamed (Pie, arXiv 2411.09317, section 5).

Starts at zero, grows only while somebody wants the room and the copies stay hidden, is cut
at the first stall. What hides is bounded by the link's rate times the compute time of a
decode-only iteration *without stall*: an iteration made longer by stall or by a prompt must
not be taken for room, or streaming more would allow streaming more.
"""

from __future__ import annotations

import msgspec

from pie_async.messages import IterationObserved

LINK_SHARE = 0.95
"""Part of the link's time that staging may fill."""
STALL_TOLERANCE = 0.01
"""Stall per compute time below which an iteration counts as hidden."""
FIRST_STEP_BLOCKS = 4
"""What is tried before the link's rate has been seen."""
CAREFUL_FROM = 0.8
"""Share of the bound up to which the limit doubles; above it grows by one twentieth."""
COOLDOWN_ITERATIONS = 16
"""No growth for this long after a cut."""
SMOOTHING = 0.2
"""Weight of a new measurement in the running averages."""
CUT = 0.9
"""At most this part of what was streamed when it stalled is allowed again."""


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """What the governor knows and what it allows."""

    block_bytes: int
    most_blocks: int
    """Never allow more: slots of the staging ring and of the host pool."""
    limit_blocks: int = 0
    link_bytes_per_s: float = 0.0
    """Measured; 0 until something was copied."""
    decode_s: float = 0.0
    """Compute time of a decode-only iteration, without stall; 0 until one ran."""
    cooldown: int = 0
    reason: str = "nothing is streamed yet"

    @property
    def bound_blocks(self) -> int:
        """Blocks whose staging hides behind a decode-only iteration."""
        if not self.link_bytes_per_s or not self.decode_s:
            return min(self.limit_blocks + FIRST_STEP_BLOCKS, self.most_blocks)
        hidden = LINK_SHARE * self.link_bytes_per_s * self.decode_s / self.block_bytes
        return min(int(hidden), self.most_blocks)


def decide(state: Headroom, seen: IterationObserved) -> Headroom:
    """The new state after an iteration: expand, hold or shrink.

    A change shows in `limit_blocks`, its cause in `reason`.
    """
    state = _measure(state, seen)
    if seen.streamed_blocks and seen.stall_s > STALL_TOLERANCE * seen.compute_s:
        return _shrink_on_stall(state, seen)
    if state.cooldown:
        return msgspec.structs.replace(state, cooldown=state.cooldown - 1)
    bound = state.bound_blocks
    if state.limit_blocks > bound and state.decode_s:
        return _set(state, bound, f"{bound} blocks hide behind a {state.decode_s:.4g} s decode")
    if seen.wanted_blocks == 0 and seen.streamed_blocks == 0:
        return _set(state, 0, "everything fits on the device")
    wanted = min(seen.wanted_blocks, bound)
    if wanted > state.limit_blocks:
        return _expand(state, wanted, bound)
    return state


def _measure(state: Headroom, seen: IterationObserved) -> Headroom:
    link, decode_s = state.link_bytes_per_s, state.decode_s
    if seen.staged_bytes and seen.staging_busy_s > 0:
        link = _blend(link, seen.staged_bytes / seen.staging_busy_s)
    if seen.decode_rows and not seen.prefill_tokens:
        decode_s = _blend(decode_s, seen.compute_s)
    return msgspec.structs.replace(state, link_bytes_per_s=link, decode_s=decode_s)


def _blend(old: float, new: float) -> float:
    return new if not old else old + SMOOTHING * (new - old)


def _expand(state: Headroom, wanted: int, bound: int) -> Headroom:
    """Quickly at first, then carefully."""
    if state.limit_blocks < CAREFUL_FROM * bound:
        grown = max(2 * state.limit_blocks, FIRST_STEP_BLOCKS)
        grown = min(grown, max(int(CAREFUL_FROM * bound), FIRST_STEP_BLOCKS))
    else:
        grown = state.limit_blocks + max(1, bound // 20)
    limit = min(grown, wanted)
    return _set(state, limit, f"{wanted} blocks wanted, {bound} would stay hidden")


def _shrink_on_stall(state: Headroom, seen: IterationObserved) -> Headroom:
    """Allow what would have fitted into the time without the stall, and wait."""
    hidden_share = seen.compute_s / (seen.compute_s + seen.stall_s)
    fitting = int(seen.streamed_blocks * min(CUT, hidden_share))
    limit = min(state.limit_blocks, fitting)
    reason = f"stalled {seen.stall_s:.3g} s in a {seen.compute_s:.3g} s iteration"
    state = _set(state, limit, reason)
    return msgspec.structs.replace(state, cooldown=COOLDOWN_ITERATIONS)


def _set(state: Headroom, limit: int, reason: str) -> Headroom:
    if limit == state.limit_blocks:
        return state
    return msgspec.structs.replace(state, limit_blocks=limit, reason=reason)
