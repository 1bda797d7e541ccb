"""Engine outputs -> text completions, streamed and whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from pie_async.openai.errors import ErrorReply
from pie_async.openai.framing import PLAIN, TextFrame, plain_frames
from pie_async.openai.logprobs import CompletionLogprobsWriter
from pie_async.openai.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    Usage,
    UsageField,
)
from pie_async.openai.usage import choice_end
from pie_async.outputs import CompletionOutput, RequestOutput, TokenLogprobs


class CompletionWriter:
    """Writes the chunks or the response of one completions request.

    Choice numbers: those of prompt p are p * n .. p * n + n - 1.
    """

    framing = PLAIN

    def __init__(
        self,
        *,
        response_id: str,
        created: int,
        model: str,
        prompts: int,
        n: int,
        echoes: Sequence[str] | None,
        top_logprobs: int | None,
        token_text: Callable[[int], str],
        has_usage: bool,
    ) -> None:
        """`echoes`: the prompts' texts, if they are to be repeated before the outputs."""
        self._id = response_id
        self._created = created
        self._model = model
        self._n = n
        self._echoes = echoes
        self._unechoed = set(range(prompts * n)) if echoes is not None else set()
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        self._logprobs = (
            None
            if top_logprobs is None
            else [CompletionLogprobsWriter(top_logprobs, token_text) for _ in range(prompts * n)]
        )
        self._no_usage: UsageField = None if has_usage else msgspec.UNSET
        self._text_frames: dict[int, TextFrame] = {}

    def opening(self) -> Iterator[CompletionResponse]:
        """What is sent before any output: nothing."""
        return iter(())

    def events(self, prompt_index: int, output: RequestOutput) -> bytes:
        """What a delta output is sent as; nothing while a character is incomplete."""
        self._keep_prompt_logprobs(prompt_index, output)
        return b"".join(
            [
                self._text_event(prompt_index, choice)
                if self._is_text(choice)
                else plain_frames(self._chunks(prompt_index, output, choice))
                for choice in output.outputs
            ]
        )

    def _is_text(self, choice: CompletionOutput) -> bool:
        """Whether text is all that there is to send, as for nearly every token."""
        is_more = choice.finish_reason or self._unechoed or self._logprobs is not None
        return choice.text != "" and not is_more

    def _text_event(self, prompt_index: int, choice: CompletionOutput) -> bytes:
        index = prompt_index * self._n + choice.index
        frame = self._text_frames.get(index)
        if frame is None:
            empty = CompletionChoice(index=index, text="")
            frame = TextFrame(plain_frames([self._response([empty], self._no_usage)]))
            self._text_frames[index] = frame
        return frame.of(choice.text)

    def _chunks(
        self, prompt_index: int, output: RequestOutput, choice: CompletionOutput
    ) -> Iterator[CompletionResponse]:
        written = self._choice(prompt_index, output, choice)
        if written.text or written.logprobs is not None or written.finish_reason is not None:
            yield self._response([written], self._no_usage)

    def ending(self, usage: Usage) -> Iterator[CompletionResponse]:
        """The last chunk of a stream that asked for usage: no choices."""
        if self._no_usage is None:
            yield self._response([], usage)

    def failure(self, reply: ErrorReply) -> bytes:
        """The event that a stream ends with when it failed."""
        return reply.event

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> CompletionResponse:
        """The whole answer from one final output per prompt."""
        choices: list[CompletionChoice] = []
        for prompt_index, output in enumerate(outputs):
            self._keep_prompt_logprobs(prompt_index, output)
            choices += [self._choice(prompt_index, output, choice) for choice in output.outputs]
        return self._response(choices, usage)

    def _keep_prompt_logprobs(self, prompt_index: int, output: RequestOutput) -> None:
        # A prompt's choices may start in different outputs; only the first has these.
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt_index] = output.prompt_logprobs

    def _choice(
        self, prompt_index: int, output: RequestOutput, choice: CompletionOutput
    ) -> CompletionChoice:
        index = prompt_index * self._n + choice.index
        token_ids, text = choice.token_ids, choice.text
        logprobs: tuple[TokenLogprobs | None, ...] = choice.logprobs or ()
        if self._echoes is not None and index in self._unechoed:
            self._unechoed.remove(index)
            text = self._echoes[prompt_index] + text
            token_ids = output.prompt_token_ids + token_ids
            logprobs = self._prompt_logprobs.get(prompt_index, ()) + logprobs
        written: CompletionLogprobs | None = None
        if self._logprobs is not None and token_ids:
            written = self._logprobs[index].write(token_ids, logprobs, text)
        return CompletionChoice(
            index=index, text=text, logprobs=written, finish_reason=choice_end(choice)
        )

    def _response(self, choices: list[CompletionChoice], usage: UsageField) -> CompletionResponse:
        return CompletionResponse(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )
