"""One token stream of a request, and the states it passes through."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pie_async.core.residency import Block
from pie_async.ids import Lane, RequestId, SequenceId
from pie_async.sampling_params import SamplingParams


class State(Enum):
    WAITING = "waiting"
    """No KV; in the queue."""
    RUNNING = "running"
    """Has a lane; in every iteration that has room for it."""
    PARKED = "parked"
    """Preempted with its KV kept: its blocks are the first to leave for the pool."""
    PAUSED = "paused"
    """Nobody reads its output. It keeps its KV, if it had some, as a parked one does, but does not
    come back, and loses it first."""
    RESUMING = "resuming"
    """Coming back: the copies it needs before it can run are under way."""
    FINISHED = "finished"


LEGAL_MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.PAUSED, State.FINISHED}),
    State.RUNNING: frozenset({State.PARKED, State.PAUSED, State.FINISHED}),
    State.PARKED: frozenset({State.RESUMING, State.WAITING, State.PAUSED, State.FINISHED}),
    State.PAUSED: frozenset({State.PARKED, State.WAITING, State.FINISHED}),
    State.RESUMING: frozenset({State.RUNNING, State.WAITING, State.PAUSED, State.FINISHED}),
    State.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence and how far it has come.

    Counting tokens: `tokens` are known to the host. `num_launched` of the positions have
    their KV written by an iteration that was issued, `num_settled` by one that has finished.
    `samples_in_flight` tokens were sampled by issued iterations and are not known yet.
    """

    id: SequenceId
    request: RequestId
    prompt_len: int
    tokens: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    order: tuple[int, int]
    """(priority, arrival number): the order in which sequences are served."""
    is_guided: bool = False
    """Whether what it may sample depends on what it has sampled."""
    arrived_s: float = 0.0
    started_s: float | None = None
    """When it ran first; times are the scheduler's."""
    prefix_root: bytes = b""
    """Its tenant's: what its first block's digest is chained to."""
    state: State = State.WAITING
    is_read: bool = True
    """Whether somebody takes its output."""
    is_follower: bool = False
    """Waits for another sequence of its request to compute their prompt."""
    lane: Lane | None = None
    is_bound: bool = False
    """Whether the lane's sampling state on the device is this sequence's."""
    table: list[Block] = field(default_factory=list)
    dirty_from: int | None = None
    """First entry of `table` that the device's copy of it lags behind."""
    num_launched: int = 0
    num_settled: int = 0
    samples_in_flight: int = 0
    launches_in_flight: int = 0
    digests: list[bytes] = field(default_factory=list)
    """Of its leading blocks, as far as somebody asked."""
    num_cached_tokens: int | None = None
    """Tokens whose KV it found when it started first."""
    num_sealed: int = 0
    """Leading blocks that are sealed."""
    num_losses: int = 0
    """Times that its KV was lost, in copies that went wrong."""
    demote_from: int = 0
    """Blocks before this index have left the device (a hint for the next demotion)."""

    def move_to(self, state: State) -> None:
        assert state in LEGAL_MOVES[self.state], f"sequence {self.id}: {self.state} -> {state}"
        self.state = state

    @property
    def expected_len(self) -> int:
        """Tokens once everything in flight has been sampled."""
        return len(self.tokens) + self.samples_in_flight

    @property
    def num_unfed(self) -> int:
        """Tokens whose KV no issued iteration writes; 1 while decoding."""
        return self.expected_len - self.num_launched

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.prompt_len
