"""Engine outputs -> chat completions, streamed and whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from pie_async.openai.errors import ErrorReply
from pie_async.openai.framing import PLAIN, TextFrame, plain_frames
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
from pie_async.openai.speaker import Speaker
from pie_async.openai.usage import choice_end
from pie_async.outputs import CompletionOutput, RequestOutput
from pie_async.parsing.events import MakeParser


class ChatWriter:
    """Writes the chunks or the response of one chat request."""

    framing = PLAIN

    def __init__(
        self,
        *,
        response_id: str,
        created: int,
        model: str,
        choices: int,
        top_logprobs: int | None,
        has_usage: bool,
        make_parser: MakeParser | None = None,
        one_call_only: bool = False,
    ) -> None:
        """Say what the chunks are to carry.

        Args:
            top_logprobs: None for no logprobs.
            has_usage: chunks carry the usage key.
            make_parser: of what takes thoughts and calls of tools out of the text; None: there
                are none.
            one_call_only: leave further calls of a choice out.
        """
        self._id = response_id
        self._created = created
        self._model = model
        self._top_logprobs = top_logprobs
        self._no_usage: UsageField = None if has_usage else msgspec.UNSET
        self._choices = choices
        self._text_frames: dict[int, TextFrame] = {}
        self._speakers = (
            None
            if make_parser is None
            else [Speaker(make_parser(), one_call_only=one_call_only) for _ in range(choices)]
        )

    def opening(self) -> Iterator[ChatChunk]:
        """What is sent before any output: every choice's role."""
        for index in range(self._choices):
            yield self._chunk(
                ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
            )

    def events(self, _prompt_index: int, output: RequestOutput) -> bytes:
        """What a delta output is sent as; nothing while a character is incomplete."""
        return b"".join(
            [
                self._text_event(choice)
                if self._is_text(choice)
                else plain_frames(self._chunks(choice))
                for choice in output.outputs
            ]
        )

    def _is_text(self, choice: CompletionOutput) -> bool:
        """Whether text is all that there is to send, as for nearly every token."""
        is_more = choice.finish_reason or self._speakers or self._top_logprobs is not None
        return choice.text != "" and not is_more

    def _text_event(self, choice: CompletionOutput) -> bytes:
        frame = self._text_frames.get(choice.index)
        if frame is None:
            empty = ChatChunkChoice(index=choice.index, delta=ChatDelta(content=""))
            frame = TextFrame(plain_frames([self._chunk(empty)]))
            self._text_frames[choice.index] = frame
        return frame.of(choice.text)

    def _chunks(self, choice: CompletionOutput) -> Iterator[ChatChunk]:
        end = choice_end(choice)
        logprobs = self._logprobs(choice)
        for delta in self._deltas(choice, is_last=end is not None, is_empty=logprobs is None):
            yield self._chunk(ChatChunkChoice(index=choice.index, delta=delta, logprobs=logprobs))
            logprobs = None
        if end is not None:
            end = self._end(choice, end)
            yield self._chunk(
                ChatChunkChoice(index=choice.index, delta=ChatDelta(), finish_reason=end)
            )

    def ending(self, usage: Usage) -> Iterator[ChatChunk]:
        """The last chunk of a stream that asked for usage: no choices."""
        if self._no_usage is None:
            yield ChatChunk(
                id=self._id, created=self._created, model=self._model, choices=[], usage=usage
            )

    def failure(self, reply: ErrorReply) -> bytes:
        """The event that a stream ends with when it failed."""
        return reply.event

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> ChatResponse:
        """The whole answer from the final output."""
        choices = [self._choice(choice) for output in outputs for choice in output.outputs]
        return ChatResponse(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _deltas(
        self, choice: CompletionOutput, *, is_last: bool, is_empty: bool
    ) -> Sequence[ChatDelta]:
        """What is new; `is_empty`: there are no logprobs either, that need a delta to be in."""
        if self._speakers is None:
            return [ChatDelta(content=choice.text)] if choice.text or not is_empty else ()
        deltas = self._speakers[choice.index].deltas(choice.text, is_last=is_last)
        return deltas or (() if is_empty else [ChatDelta(content="")])

    def _end(self, choice: CompletionOutput, end: ChoiceEnd) -> ChoiceEnd:
        has_called = self._speakers is not None and self._speakers[choice.index].has_called
        return "tool_calls" if has_called and end == "stop" else end

    def _choice(self, choice: CompletionOutput) -> ChatChoice:
        end = choice_end(choice)
        assert end is not None, "a final output has ended"
        message = ChatMessage(content=choice.text)
        if self._speakers is not None:
            message = self._speakers[choice.index].message(choice.text)
        return ChatChoice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(choice),
            finish_reason=self._end(choice, end),
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
