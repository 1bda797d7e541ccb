"""How a sequence goes on in a new engine: its first command again, with the output that it has.

A sequence's next token depends on the tokens before it, on which of them are output (penalties and
least lengths ask), on its seed and its position. A new engine is told all of these, so it goes on
as one that lost its KV to preemption does.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pie_async.ids import SequenceId
from pie_async.messages import Submit
from pie_async.sampling_params import SamplingParams


class Course:
    """One unfinished sequence and the output that its stream has."""

    def __init__(self, sequence: SequenceId, index: int, tokens: Sequence[int]) -> None:
        """`tokens`: the stream's own, which grow."""
        self.sequence = sequence
        self.index = index
        self.tokens = tokens

    def resume(self, first: Submit, max_model_len: int) -> Submit | None:
        """The command that lets it go on; None if there is no room left for a next token.

        Args:
            first: the command that the request began with.
            max_model_len: the new engine's, which may have got less memory.
        """
        max_tokens = min(first.max_tokens, max_model_len - len(first.prompt_tokens))
        if max_tokens <= len(self.tokens):
            return None
        sampling = first.sampling
        if self.tokens or self.index:  # their reader has the prompt's logprobs, or the first's
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return msgspec.structs.replace(
            first,
            sequences=(self.sequence,),
            output_tokens=tuple(self.tokens),
            sampling=sampling,
            seed=first.seed + self.index,
            max_tokens=max_tokens,
        )


def engine_params(params: SamplingParams) -> SamplingParams:
    """What of a caller's parameters an engine without text needs: `Submit` has the most tokens,
    stop strings are looked for where the text is."""
    return msgspec.structs.replace(params, stop=(), max_tokens=None)
