"""Counting a request's tokens, and how its choices ended."""

from __future__ import annotations

from pie_async.errors import EngineStopped
from pie_async.openai.responses import ChoiceEnd, PromptDetails, Usage
from pie_async.outputs import CompletionOutput, RequestOutput


class UsageCounter:
    """Adds up what a request's outputs used."""

    def __init__(self, prompt_tokens: int) -> None:
        """`prompt_tokens`: of all prompts, each counted once whatever `n` is."""
        self._prompt_tokens = prompt_tokens
        self._output_tokens = 0
        self._cached_tokens: dict[int, int] = {}

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count a delta or final output."""
        self._cached_tokens[prompt_index] = output.num_cached_tokens
        for choice in output.outputs:
            self._output_tokens += len(choice.token_ids)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._output_tokens,
            total_tokens=self._prompt_tokens + self._output_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(self._cached_tokens.values())),
        )


def choice_end(choice: CompletionOutput) -> ChoiceEnd | None:
    """OpenAI's finish reason; None while the choice goes on.

    Raises:
        EngineStopped: the engine ended it (the client did not: it is still being written to).
    """
    if choice.finish_reason == "abort":
        raise EngineStopped("the request was cancelled by the server before it was finished")
    return choice.finish_reason
