"""Everything that crosses an actor boundary, and one union per mailbox.

Messages are frozen plain data: identities, counts, slots, seconds. Tensors, events and
exceptions stay with the actor that owns them, so any message can be logged, replayed,
compared with == and, later, sent to another process (`encode` / `decode`).
Commands are imperative, facts are past tense.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.ids import (
    BlockId,
    DeviceSlot,
    HostSlot,
    IterationId,
    Lane,
    MaskSlot,
    RequestId,
    SequenceId,
)
from pie_async.outputs import FinishReason
from pie_async.sampling_params import SamplingParams
from pie_async.structured import StructuredOutputs


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that crosses an actor boundary."""


# --- parts of messages: small, many per message, therefore encoded as arrays -------------


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One sequence's part of an iteration."""

    sequence: SequenceId
    lane: Lane
    start: int
    """Position of the first token fed; the KV of all positions before it is written."""
    tokens: tuple[int, ...]
    """Token ids to feed. Empty: one token, the one this lane sampled last, which never
    left the device."""
    is_sampled: bool
    """Whether a next token is sampled after the last one fed."""
    mask: MaskSlot | None = None
    """Where the mask lies of what may be sampled; None: anything may."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) or 1


class TableUpdate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New entries of one lane's block table, ordered on the compute stream."""

    lane: Lane
    first: int
    """Index of the first entry that changes."""
    slots: tuple[DeviceSlot, ...]
    """Resident or staging slots, in block order."""


class LaneBinding(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence takes over a lane: what its sampling needs to know."""

    lane: Lane
    sequence: SequenceId
    sampling: SamplingParams
    seed: int
    """This sequence's own seed, already drawn and distinct among a request's sequences."""
    stop_ids: tuple[int, ...]
    """Token ids masked until `sampling.min_tokens` output tokens exist."""
    prompt_len: int
    """Prompt tokens; a token at position p is output number p - prompt_len."""
    history: tuple[int, ...] = ()
    """Prompt and output tokens so far, given only if `sampling.counts_tokens`."""


class CopyRun(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`count` adjacent host slots that go to `count` adjacent staging slots."""

    host_slot: HostSlot
    device_slot: DeviceSlot
    count: int


class BlockMove(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One block, all layers, between its device slot and its host slot."""

    block: BlockId
    device_slot: DeviceSlot
    host_slot: HostSlot


class SampledToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The token a row sampled."""

    sequence: SequenceId
    token: int
    logprob: float = 0.0
    """Natural logarithm, of the raw distribution; meaningful only if logprobs were asked for."""
    rank: int = 0
    """1 for the likeliest token; 0 when logprobs were not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (token id, logprob) pairs, likeliest first."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of the prompt tokens at positions `first`, `first + 1`, ... of a sequence."""

    sequence: SequenceId
    first: int
    tokens: tuple[SampledToken, ...]


class FirstToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a sequence once it has its first token."""

    cached_tokens: int = 0
    """Prompt tokens whose KV was found instead of computed."""
    queued_s: float = 0.0
    """From its arrival to its start."""
    prefill_s: float = 0.0
    """From its start to this token."""


class Advance(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A sequence got its next token, or ended."""

    sequence: SequenceId
    token: SampledToken | None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token id that ended it, unless that was the model's own end-of-sequence."""
    first: FirstToken | None = None
    """With the first token, that one engine is enough for: not after a restart."""
    lost_because: str | None = None
    """Why its KV was lost once too often: its request ends with `SequenceLost`."""
    unguided_because: str | None = None
    """Why its guide could go no further: its request ends with `GuideFailed`."""


class MaskOrder(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A mask that is wanted: of what may follow a sequence's output."""

    sequence: SequenceId
    slot: MaskSlot
    """Where to put it."""
    tokens: tuple[int, ...]
    """Output tokens since the sequence's last order."""
    guide: StructuredOutputs | None = None
    """With its first order: what guides it."""


class MaskMade(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of an order."""

    sequence: SequenceId
    slot: MaskSlot
    made_s: float
    """How long it took; of several made together their mean, unless that was suspiciously long."""
    is_ended: bool = False
    """The output is complete and nothing may follow: there is no mask."""
    refusal: str | None = None
    """Why there is none, and will be none for this sequence."""


# --- to the scheduler ---------------------------------------------------------------------


class Submit(Message, frozen=True, kw_only=True):
    """Command: run these sequences, which share one prompt."""

    request: RequestId
    sequences: tuple[SequenceId, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...] = ()
    """Output that they already have, and go on after: another engine computed it."""
    sampling: SamplingParams
    seed: int
    """The request's seed, already drawn; sequence i uses seed + i."""
    max_tokens: int
    """Most output tokens, already cut to the context's length; `output_tokens` count."""
    priority: int = 0
    """Lower runs first; equal priorities run first come, first served."""
    cache_salt: str | None = None
    """The tenant: blocks are shared among sequences of the same salt alone. None is a tenant
    too, the common one."""


class Cancel(Message, frozen=True, kw_only=True):
    """Command: end these sequences now and take their memory back. Unknown ones are ignored."""

    sequences: tuple[SequenceId, ...]
    reason: FinishReason = "abort"
    """"stop" when their text reached a stop string."""


class ReadingChanged(Message, frozen=True, kw_only=True):
    """Fact: somebody reads these sequences' output again, or nobody has for a while."""

    sequences: tuple[SequenceId, ...]
    is_read: bool


class Drain(Message, frozen=True, kw_only=True):
    """Command: accept nothing more, finish what is accepted, then say so."""


class IterationRan(Message, frozen=True, kw_only=True):
    """Fact: the device finished an iteration."""

    iteration: IterationId
    sampled: tuple[SampledToken, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    compute_s: float
    """Time the compute stream worked."""
    stall_s: float
    """Time the compute stream waited for staged blocks."""
    mask_wait_s: float = 0.0
    """Time it stood still behind the layers: a guided sequence's mask was not made yet."""
    unstaged: tuple[HostSlot, ...] = ()
    """Host slots whose blocks were not staged right: rows that read them computed nothing."""


class IterationStaged(Message, frozen=True, kw_only=True):
    """Fact: all staging copies of an iteration finished."""

    iteration: IterationId
    staged_bytes: int
    busy_s: float
    """Time the copy stream was copying (not waiting for a free ring buffer)."""
    failed_attempts: int = 0
    """Attempts to copy that went wrong, and were made again as long as that is allowed."""
    written_back_bytes: int = 0
    """With `exchange`: copied to the pool."""


class SwappedIn(Message, frozen=True, kw_only=True):
    """Fact: these pooled blocks are in their device slots; their pooled copies stay valid."""

    blocks: tuple[BlockId, ...]
    swapped_bytes: int
    busy_s: float
    failed: tuple[BlockId, ...] = ()
    """The others of the command: they could not be copied and are where they were."""
    failed_attempts: int = 0


class SwappedOut(Message, frozen=True, kw_only=True):
    """Fact: these blocks' pooled copies are complete."""

    blocks: tuple[BlockId, ...]
    swapped_bytes: int
    busy_s: float
    failed: tuple[BlockId, ...] = ()
    """The others of the command: they could not be copied and are where they were."""
    failed_attempts: int = 0


LimitCause = Literal["idle", "fits", "demand", "hiding", "itl", "stall", "cost", "fixed"]
"""Why so much may be streamed and no more: nothing was wanted yet; everything fits on the device;
it was raised because more is wanted; more would not hide; more would break the ITL limit; compute
stalled; streaming would cost more than it brings; it was fixed by the caller."""


class SetStreamedLimit(Message, frozen=True, kw_only=True):
    """Command: at most this many blocks may be streamed; why, for metrics and the log."""

    limit_blocks: int
    cause: LimitCause
    least_blocks: int = 0
    """Stream so many even where everything fits: for measurements."""
    reason: str


class PoolGrown(Message, frozen=True, kw_only=True):
    """Fact: the host pool has so many slots now."""

    slots: int
    is_all: bool
    longest: int | None = None
    """Most tokens of one sequence, if that changed: not all of the pool could be had."""


class PoolShrunk(Message, frozen=True, kw_only=True):
    """Fact: memory of the host pool was given back; it has so many slots left."""

    slots: int


class ReviewPool(Message, frozen=True, kw_only=True):
    """Command: a period is over; say (`ResizePool`) how many slots the host pool should have."""


class MasksMade(Message, frozen=True, kw_only=True):
    """Fact: these masks lie in their slots, or there will be none."""

    masks: tuple[MaskMade, ...]


class MasksLate(Message, frozen=True, kw_only=True):
    """Fact: planning has waited long enough for the masks that were ordered last."""

    number: int
    """Counts such waits; an old one says nothing."""


SchedulerMail = (
    Submit
    | MasksMade
    | MasksLate
    | PoolGrown
    | PoolShrunk
    | ReviewPool
    | Cancel
    | ReadingChanged
    | Drain
    | IterationRan
    | IterationStaged
    | SwappedIn
    | SwappedOut
    | SetStreamedLimit
)

# --- to compute ---------------------------------------------------------------------------


class RunIteration(Message, frozen=True, kw_only=True):
    """Command: one forward pass of these rows, and their sampling."""

    iteration: IterationId
    rows: tuple[Row, ...]
    bindings: tuple[LaneBinding, ...] = ()
    tables: tuple[TableUpdate, ...] = ()
    is_staged: bool = False
    """Whether a StageIteration of the same number belongs to it."""
    awaits_masks: bool = False
    """Rows of it sample under masks that are not made yet: after its layers it waits for the
    SampleIteration of the same number."""


class SampleIteration(Message, frozen=True, kw_only=True):
    """Command: the masks that an iteration awaits are made; sample its rows."""

    iteration: IterationId


ComputeMail = RunIteration | SampleIteration

# --- to swap-in ---------------------------------------------------------------------------


class StageIteration(Message, frozen=True, kw_only=True):
    """Command: for every layer, copy these runs through the staging ring ahead of compute."""

    iteration: IterationId
    runs: tuple[CopyRun, ...]


class SwapIn(Message, frozen=True, kw_only=True):
    """Command: copy these pooled blocks to their device slots, to stay (a promotion)."""

    moves: tuple[BlockMove, ...]


SwapInMail = StageIteration | SwapIn

# --- to swap-out --------------------------------------------------------------------------


class SwapOut(Message, frozen=True, kw_only=True):
    """Command: copy these resident blocks to their host slots (a demotion)."""

    moves: tuple[BlockMove, ...]


class ResizePool(Message, frozen=True, kw_only=True):
    """Command: the host pool is to have so many slots; nothing lies in those that go.

    `PoolGrown`, maybe several, or `PoolShrunk` tell of it; nothing does if it has as many.
    """

    slots: int


SwapOutMail = SwapOut | ResizePool

# --- to the guide actor -------------------------------------------------------------------


class MakeMasks(Message, frozen=True, kw_only=True):
    """Command: make these masks; `MasksMade` tells, of some earlier than of others."""

    orders: tuple[MaskOrder, ...]


class ForgetGuides(Message, frozen=True, kw_only=True):
    """Command: these sequences have ended."""

    sequences: tuple[SequenceId, ...]


GuideMail = MakeMasks | ForgetGuides

# --- to the expansion governor ------------------------------------------------------------


class IterationObserved(Message, frozen=True, kw_only=True):
    """Fact: what an iteration cost, and how much KV is wanted."""

    iteration: IterationId
    compute_s: float
    stall_s: float
    staged_bytes: int
    staging_busy_s: float
    decode_rows: int
    prefill_tokens: int
    resident_blocks: int
    """In use on the device, whoever reads them."""
    streamed_blocks: int
    wanted_blocks: int
    """Blocks that would have to be streamed for everything submitted to run at once."""


GovernorMail = IterationObserved

# --- to delivery --------------------------------------------------------------------------


class SequencesAdvanced(Message, frozen=True, kw_only=True):
    """Fact: what an iteration or a cancellation did to these sequences."""

    iteration: IterationId
    advances: tuple[Advance, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class Drained(Message, frozen=True, kw_only=True):
    """Fact: nothing accepted is left unfinished, and nothing more is accepted."""


DeliveryMail = SequencesAdvanced | Drained

AnyMessage = (
    Submit
    | MasksMade
    | MasksLate
    | MakeMasks
    | ForgetGuides
    | PoolGrown
    | PoolShrunk
    | ReviewPool
    | ResizePool
    | Cancel
    | ReadingChanged
    | Drain
    | IterationRan
    | IterationStaged
    | SwappedIn
    | SwappedOut
    | SetStreamedLimit
    | RunIteration
    | SampleIteration
    | StageIteration
    | SwapIn
    | SwapOut
    | IterationObserved
    | SequencesAdvanced
    | Drained
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """One message as msgpack, tagged with its name."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """The message that `encode` wrote.

    Raises:
        msgspec.DecodeError: not one of the messages of this module.
    """
    try:
        message: AnyMessage = _decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError, InvalidRequest) as error:
        # What msgspec lets through: bad text, deep nesting, and what fields check by themselves.
        raise msgspec.DecodeError(str(error)) from error
    return message
