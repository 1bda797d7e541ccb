"""How a sequence goes on in a new engine: what is submitted, and what is made of the answers.

A sequence's next token depends on the tokens before it, its seed and its position alone. So one
whose tokens so far are given as its prompt goes on as if nothing had happened. Presence and
frequency penalties also ask which of the tokens are output, and a prompt has none: with these
the output is computed again from its start, and what was delivered is compared, not repeated.
"""

from __future__ import annotations

import msgspec

from pie_async.ids import SequenceId
from pie_async.messages import Advance, Submit
from pie_async.resilience.errors import RequestGivenUp
from pie_async.sampling_params import SamplingParams


class Course:
    """One unfinished sequence: what it has, and what its current run still repeats."""

    def __init__(self, sequence: SequenceId, index: int) -> None:
        self.sequence = sequence
        self.index = index
        self.tokens: list[int] = []
        self._num_repeated = 0
        """Tokens of the current run that were compared."""
        self._num_to_repeat = 0

    @property
    def reached(self) -> int:
        """Output tokens that its current run has."""
        is_repeating = self._num_repeated < self._num_to_repeat
        return self._num_repeated if is_repeating else len(self.tokens)

    def take(self, advance: Advance) -> Advance | None:
        """What of this is news.

        Raises:
            RequestGivenUp: a repeated token is another one than was delivered.
        """
        token = advance.token
        if token is None:
            return advance
        if self._num_repeated < self._num_to_repeat:
            if token.token != self.tokens[self._num_repeated]:
                raise RequestGivenUp(
                    "the engine was restarted and did not compute the same output again"
                )
            self._num_repeated += 1
            return None
        if advance.cached_tokens and self.tokens:  # of a prompt that holds output
            advance = Advance(advance.sequence, token, advance.finish_reason, advance.stop_token)
        self.tokens.append(token.token)
        return advance

    def resume(self, first: Submit, max_model_len: int) -> Submit | None:
        """The command that lets it go on; None if there is no room left for a next token.

        Args:
            first: the command that the request began with.
            max_model_len: the new engine's, which may have got less memory.
        """
        num_tokens = len(self.tokens)
        sampling, prompt = first.sampling, first.prompt_tokens
        max_tokens = first.max_tokens
        self._num_repeated = self._num_to_repeat = 0
        if self.tokens and sampling.presence_penalty == sampling.frequency_penalty == 0.0:
            prompt = (*prompt, *self.tokens)
            max_tokens -= num_tokens
            sampling = msgspec.structs.replace(
                sampling, min_tokens=max(0, sampling.min_tokens - num_tokens)
            )
        else:
            self._num_to_repeat = num_tokens
        if num_tokens or self.index:  # their reader has the prompt's logprobs, or the first's
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        max_tokens = min(max_tokens, max_model_len - len(prompt))
        if max_tokens < 1 + self._num_to_repeat:
            return None
        return msgspec.structs.replace(
            first,
            sequences=(self.sequence,),
            prompt_tokens=prompt,
            sampling=sampling,
            seed=first.seed + self.index,
            max_tokens=max_tokens,
        )


def engine_params(params: SamplingParams) -> SamplingParams:
    """What of a caller's parameters an engine without text needs: `Submit` has the most tokens,
    stop strings are looked for where the text is."""
    return msgspec.structs.replace(params, stop=(), max_tokens=None)
