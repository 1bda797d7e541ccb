"""Who runs in which lane, and what becomes of the tokens sampled there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pie_async.messages import LaneBinding, PromptLogprobs, Row, SampledToken
from pie_async.model.prompt_scoring import PromptScorer, reported
from pie_async.model.sampling import LaneSampler, Needs, Sampled

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Results:
    """What an iteration brings back. Readable after `collect`, which must wait for the device."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.sampled: tuple[SampledToken, ...] = ()
        self.prompt_logprobs: tuple[PromptLogprobs, ...] = ()
        self.reports: Iterable[SampledToken] = ()
        self.scores: list[Callable[[], PromptLogprobs]] = []

    def collect(self) -> None:
        """Read what was brought to the host; once the device got so far."""
        if self.reports:
            self.sampled, self.reports = tuple(self.reports), ()
        if self.scores:
            self.prompt_logprobs, self.scores = tuple(read() for read in self.scores), []


class Lanes:
    """Per lane: its sequence's wishes and its sampling state.

    Args:
        lanes: number of lanes.
        logits: see `PromptScorer`.
    """

    def __init__(
        self,
        lanes: int,
        vocab_size: int,
        device: torch.device,
        logits: Callable[[Tensor], Tensor],
    ) -> None:
        self.bindings: dict[int, LaneBinding] = {}
        self.sampler = LaneSampler(lanes=lanes, vocab_size=vocab_size, device=device)
        self._scorer = PromptScorer(logits, kept=4 * lanes)

    def bind(self, bindings: Sequence[LaneBinding]) -> None:
        self.bindings.update((binding.lane, binding) for binding in bindings)
        self.sampler.bind(*bindings)

    def take_masks(self, rows: Iterable[Row]) -> None:
        """Sample these rows under their masks, in this iteration."""
        if masked := {row.lane: row.mask for row in rows if row.mask is not None}:
            self.sampler.set_masks(masked)

    @property
    def counts_tokens(self) -> bool:
        """Whether some sequence's penalties need to know what is fed."""
        return any(binding.sampling.counts_tokens for binding in self.bindings.values())

    def needs(self, rows: Iterable[Row]) -> Needs:
        return self.sampler.needs(row.lane for row in rows)

    def wants_scores(self, row: Row) -> bool:
        """Whether prompt tokens of this row are to be scored."""
        binding = self.bindings[row.lane]
        return binding.sampling.prompt_logprobs is not None and row.start < binding.prompt_len

    def report(self, rows: Sequence[Row], sampled: Sampled) -> Iterator[SampledToken]:
        """The rows' tokens, on their way to the host; see `prompt_scoring.reported`."""
        wanted = [self.bindings[row.lane].sampling.logprobs for row in rows]
        sequences = [row.sequence for row in rows]
        return reported(sequences, sampled.tokens, sampled.logprobs, wanted)

    def scores(self, rows: Iterable[Row], hidden: Tensor) -> Iterator[Callable[[], PromptLogprobs]]:
        """Scores of the rows that want them.

        Args:
            rows: in the order of the fed tokens.
            hidden: [n, hidden] of the last layer.
        """
        end = 0
        for row in rows:
            start, end = end, end + row.num_tokens
            if self.wants_scores(row):
                binding = self.bindings[row.lane]
                top = binding.sampling.prompt_logprobs or 0
                scores = self._scorer.score(row, hidden[start:end], binding.prompt_len, top)
                if scores is not None:
                    yield scores
