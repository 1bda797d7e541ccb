"""Tokens of the simulated device: drawn from the sequence's seed and the position alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from pie_async.errors import DeviceFault
from pie_async.ids import SequenceId
from pie_async.messages import LaneBinding, PromptLogprobs, Row, SampledToken

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK = (1 << 64) - 1


class EndOfSequence(NamedTuple):
    """How often a sampled token ends its sequence, and with which ids."""

    rate: float = 0.0
    ids: tuple[int, ...] = ()


class _Lane:
    """What sampling needs of the sequence in a lane."""

    __slots__ = (
        "binding",
        "last_token",
        "may_end_at",
        "num_logprobs",
        "salt",
        "sequence",
        "stop_ids",
    )

    def __init__(self, binding: LaneBinding, end: EndOfSequence, device_seed: int) -> None:
        self.binding = binding
        self.sequence = binding.sequence
        self.salt = hash((device_seed, binding.seed))
        self.stop_ids = frozenset((*binding.stop_ids, *end.ids))
        self.may_end_at = binding.prompt_len + binding.sampling.min_tokens
        self.num_logprobs = binding.sampling.logprobs
        self.last_token: int | None = None


class SimSampler:
    """What every lane samples.

    Runs that batch or place sequences differently give the same tokens. Ids that would stop
    a sequence are never drawn, but for the ends that `end` asks for.
    """

    def __init__(self, *, seed: int, vocab_size: int, end: EndOfSequence) -> None:
        self._seed = seed
        self._vocab_size = vocab_size
        self._end = end
        self._end_threshold = int(end.rate * (1 << 24)) if end.ids else 0
        self._lanes: dict[int, _Lane] = {}
        self._wants_prompt_logprobs = False
        self._masks: NDArray[np.int32] | None = None

    def use_masks(self, masks: NDArray[np.int32]) -> None:
        """Where the masks of guided sequences lie: [slots, words], lowest bits first."""
        self._masks = masks

    def bind(self, binding: LaneBinding) -> None:
        """A sequence takes over a lane."""
        self._lanes[binding.lane] = _Lane(binding, self._end, self._seed)
        if binding.sampling.prompt_logprobs is not None:
            self._wants_prompt_logprobs = True

    def last_token(self, row: Row) -> tuple[int]:
        """What this row's lane sampled last.

        Raises:
            DeviceFault: nothing yet for this sequence, or the lane is another's.
        """
        token = self._lane(row).last_token
        if token is None:
            raise DeviceFault(
                f"sequence {row.sequence} is to be fed the token that lane {row.lane} sampled "
                "last, but the lane has sampled none for it"
            )
        return (token,)

    def sample(
        self, rows: Sequence[Row], *, garbled: Collection[SequenceId] = ()
    ) -> tuple[SampledToken, ...]:
        """The next token of every row that asks for one; raises DeviceFault as `last_token`.

        Args:
            garbled: sequences whose KV is known to be wrong: so are their tokens.
        """
        tokens = tuple([self._sample_row(row) for row in rows if row.is_sampled])
        if garbled:
            tokens = tuple(
                self._wrong(each) if each.sequence in garbled else each for each in tokens
            )
        return tokens

    def prompt_logprobs(self, rows: Sequence[Row]) -> tuple[PromptLogprobs, ...]:
        """Made-up logprobs of the fed prompt tokens, where asked for."""
        if not self._wants_prompt_logprobs:
            return ()
        found = (self._prompt_logprobs(row) for row in rows)
        return tuple(logprobs for logprobs in found if logprobs is not None)

    def _lane(self, row: Row) -> _Lane:
        lane = self._lanes.get(row.lane)
        if lane is None or lane.sequence != row.sequence:
            raise DeviceFault(
                f"sequence {row.sequence} runs in lane {row.lane}, which is not bound to it"
            )
        return lane

    def _sample_row(self, row: Row) -> SampledToken:
        lane = self._lane(row)
        position = row.start + (len(row.tokens) or 1)
        drawn = hash((lane.salt, position)) & _MASK
        if row.mask is not None:
            token = self._draw_allowed(drawn, row.mask, lane.stop_ids)
        elif position >= lane.may_end_at and drawn >> 40 < self._end_threshold:
            token = self._end.ids[drawn % len(self._end.ids)]
        else:
            token = drawn % self._vocab_size
            if token in lane.stop_ids:
                token = self._next_free(token, lane.stop_ids)
        lane.last_token = token
        if lane.num_logprobs is None:
            return SampledToken(row.sequence, token)
        return self._with_logprobs(row, token, lane.num_logprobs)

    def _draw_allowed(self, drawn: int, slot: int, stop_ids: frozenset[int]) -> int:
        """One of the tokens that a mask allows; one that stops nothing, if there is one."""
        assert self._masks is not None, "use_masks() comes before guided sequences"
        bits = np.unpackbits(self._masks[slot].view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: self._vocab_size])
        count = len(allowed)
        tokens = (int(allowed[(drawn + i) % count]) for i in range(count))
        return next((token for token in tokens if token not in stop_ids), int(allowed[0]))

    def _wrong(self, right: SampledToken) -> SampledToken:
        return msgspec.structs.replace(right, token=(right.token + 1) % self._vocab_size)

    def _next_free(self, token: int, stop_ids: frozenset[int]) -> int:
        """The next id that stops nothing; `token` itself if every id does."""
        others = ((token + i) % self._vocab_size for i in range(1, self._vocab_size))
        return next((other for other in others if other not in stop_ids), token)

    def _with_logprobs(self, row: Row, token: int, count: int) -> SampledToken:
        """A made-up distribution whose likeliest token is the given one."""
        top = tuple(((token + i) % self._vocab_size, -1.0 - i) for i in range(count))
        return SampledToken(row.sequence, token, -1.0, 1, top)

    def _prompt_logprobs(self, row: Row) -> PromptLogprobs | None:
        binding = self._lane(row).binding
        count = binding.sampling.prompt_logprobs
        first = max(row.start, 1)
        tokens = row.tokens[first - row.start : max(0, binding.prompt_len - row.start)]
        if count is None or not tokens:
            return None
        return PromptLogprobs(
            row.sequence, first, tuple(self._with_logprobs(row, t, count) for t in tokens)
        )
