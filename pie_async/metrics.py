"""What is counted while an engine runs, and the snapshot that callers get."""

from __future__ import annotations

import msgspec

from pie_async.messages import LimitCause


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an engine. Blocks are counted over all layers; times are seconds."""

    # sequences
    running: int = 0
    waiting: int = 0
    parked: int = 0
    """Preempted sequences whose KV waits in the host pool."""
    paused: int = 0
    """Sequences that wait for somebody to read their output."""

    # memory, in blocks of `block_bytes`
    block_bytes: int = 0
    block_tokens: int = 0
    device_blocks: int = 0
    """Resident slots in all."""
    host_blocks: int = 0
    """Host pool slots that can be used; they rise to its ceiling while memory is pinned and
    fall while it is given back."""
    resident_blocks: int = 0
    """Device slots in use, those of cached blocks not counted."""
    cached_blocks: int = 0
    """Blocks in device slots that only the prefix cache keeps: they count as free."""
    streamed_blocks: int = 0
    parked_blocks: int = 0
    pooled_blocks: int = 0
    """Host pool slots in use, clean copies of resident blocks included."""
    streamed_limit_blocks: int = 0
    """What the expansion governor allows to be streamed, as of the last iteration."""
    expansion_ratio: float = 1.0
    """(device blocks + streamed blocks) / device blocks."""
    governor_cause: LimitCause = "idle"
    """Why the limit is what it is, in a word."""
    governor_reason: str = ""
    """The same with its numbers."""

    pending_s: float = 0.0
    """How long the device has been at the oldest iteration that was issued; 0 while idle."""

    # totals since the start
    uptime_s: float = 0.0
    iterations: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found instead of computed."""
    prefix_query_tokens: int = 0
    """Tokens of sequences that looked for their leading blocks, when they started first."""
    prefix_hit_tokens: int = 0
    """Tokens that they found."""
    cache_evictions: int = 0
    """Cached blocks whose slots were taken for others."""
    output_tokens: int = 0
    sequences_finished: int = 0
    """Ended for any reason, cancelled ones included."""
    sequences_cancelled: int = 0
    preemptions_parked: int = 0
    preemptions_recomputed: int = 0
    """Those of the parked and paused that lost their KV after all: the pool was full."""
    pauses: int = 0
    """Sequences taken off because nobody read their output, each time."""
    demotions: int = 0
    """Blocks copied to the pool."""
    promotions: int = 0
    """Blocks copied back to stay."""
    copy_attempts_failed: int = 0
    """Attempts to copy that failed or, with `check_copies`, arrived corrupted; a copy has three."""
    copies_lost: int = 0
    """Copies of a block that had no good attempt."""
    sequences_begun_anew: int = 0
    """Times that a sequence was computed again because its KV was lost in a copy."""
    sequences_lost: int = 0
    """Sequences that ended because that happened too often."""
    compute_s: float = 0.0
    stall_s: float = 0.0
    """Compute waiting for staged blocks."""
    mask_wait_s: float = 0.0
    """Compute standing still until masks of guided sequences were made."""
    decode_iterations: int = 0
    """Iterations without prompts, once their staging was over as well; with the times below."""
    decode_compute_s: float = 0.0
    decode_stall_s: float = 0.0
    decode_staging_s: float = 0.0
    """In which the link was busy staging for them."""
    prefill_iterations: int = 0
    """The same of iterations that compute prompts, whatever else they do."""
    prefill_compute_s: float = 0.0
    prefill_stall_s: float = 0.0
    prefill_staging_s: float = 0.0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    h2d_busy_s: float = 0.0
    d2h_busy_s: float = 0.0

    @property
    def stall_share(self) -> float:
        """Part of the compute stream's time spent waiting for swaps, 0..1."""
        total_s = self.compute_s + self.stall_s
        return self.stall_s / total_s if total_s else 0.0

    @property
    def h2d_busy_share(self) -> float:
        """Part of the uptime that copies to the device took, 0..1."""
        return self.h2d_busy_s / self.uptime_s if self.uptime_s else 0.0

    @property
    def d2h_busy_share(self) -> float:
        """Part of the uptime that copies to the pool took, 0..1."""
        return self.d2h_busy_s / self.uptime_s if self.uptime_s else 0.0


class LinkUse(msgspec.Struct, frozen=True, kw_only=True):
    """How busy the link was between two snapshots. Shares are of the time between them, 0..1."""

    h2d_busy_s: float
    d2h_busy_s: float
    h2d_busy_share: float
    d2h_busy_share: float

    @classmethod
    def between(cls, first: EngineStats, last: EngineStats) -> LinkUse:
        took_s = last.uptime_s - first.uptime_s
        h2d_s = last.h2d_busy_s - first.h2d_busy_s
        d2h_s = last.d2h_busy_s - first.d2h_busy_s
        return cls(
            h2d_busy_s=h2d_s,
            d2h_busy_s=d2h_s,
            h2d_busy_share=h2d_s / took_s if took_s > 0 else 0.0,
            d2h_busy_share=d2h_s / took_s if took_s > 0 else 0.0,
        )
