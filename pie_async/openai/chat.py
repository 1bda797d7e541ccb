"""Engine outputs -> chat completions, streamed and whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from pie_async.openai.logprobs import chat_logprobs
from pie_async.openai.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    ChoiceEnd,
    Usage,
    UsageField,
)
from pie_async.openai.usage import choice_end
from pie_async.outputs import CompletionOutput, RequestOutput


class ChatWriter:
    """Writes the chunks or the response of one chat request."""

    def __init__(
        self,
        *,
        response_id: str,
        created: int,
        model: str,
        choices: int,
        top_logprobs: int | None,
        has_usage: bool,
    ) -> None:
        """`top_logprobs`: None for no logprobs; `has_usage`: chunks carry the usage key."""
        self._id = response_id
        self._created = created
        self._model = model
        self._choices = choices
        self._top_logprobs = top_logprobs
        self._no_usage: UsageField = None if has_usage else msgspec.UNSET

    def opening(self) -> Iterator[ChatChunk]:
        """What is sent before any output: every choice's role."""
        for index in range(self._choices):
            yield self._chunk(
                ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
            )

    def chunks(self, _prompt_index: int, output: RequestOutput) -> Iterator[ChatChunk]:
        """What a delta output is sent as; nothing while a character is incomplete."""
        for choice in output.outputs:
            end = choice_end(choice)
            logprobs = self._logprobs(choice)
            if choice.text or logprobs is not None:
                delta = ChatDelta(content=choice.text)
                yield self._chunk(
                    ChatChunkChoice(index=choice.index, delta=delta, logprobs=logprobs)
                )
            if end is not None:
                yield self._chunk(
                    ChatChunkChoice(index=choice.index, delta=ChatDelta(), finish_reason=end)
                )

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """The last chunk of a stream that asked for usage: no choices."""
        return ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=[], usage=usage
        )

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> ChatResponse:
        """The whole answer from the final output."""
        choices = [self._choice(choice) for output in outputs for choice in output.outputs]
        return ChatResponse(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _choice(self, choice: CompletionOutput) -> ChatChoice:
        end: ChoiceEnd | None = choice_end(choice)
        assert end is not None, "a final output has ended"
        return ChatChoice(
            index=choice.index,
            message=ChatMessage(content=choice.text),
            logprobs=self._logprobs(choice),
            finish_reason=end,
        )

    def _logprobs(self, choice: CompletionOutput) -> ChatLogprobs | None:
        if self._top_logprobs is None or not choice.logprobs:
            return None
        return chat_logprobs(choice.token_ids, choice.logprobs, self._top_logprobs)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[choice],
            usage=self._no_usage,
        )
