"""OpenAI's API over an engine, without HTTP."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import Sequence

import msgspec

from pie_async.chat_options import ChatOptions
from pie_async.errors import ContextTooLong
from pie_async.openai.answer import Answer, Writer
from pie_async.openai.asked import LAST_TOKENS, ChatAsked, guided
from pie_async.openai.backend import Backend, OutputStream, Prompt
from pie_async.openai.chat import ChatWriter
from pie_async.openai.completion import CompletionWriter
from pie_async.openai.errors import ModelNotFound
from pie_async.openai.feed import OutputFeed
from pie_async.openai.json_errors import respelled
from pie_async.openai.latency import LatencySink, NoLatencySink, RequestLatency
from pie_async.openai.reading import (
    CHAT_READER,
    COMPLETION_READER,
    DETOKENIZE_READER,
    RESPONSES_READER,
    TOKENIZE_READER,
)
from pie_async.openai.requests import GenerationRequest
from pie_async.openai.response_request import ResponsesRequest, as_responses_say
from pie_async.openai.response_writer import ResponseWriter, new_response
from pie_async.openai.responses import ModelCard, ModelList, Text, Tokens
from pie_async.openai.scoring import PromptOnly
from pie_async.openai.speaker import Speaker
from pie_async.openai.usage import UsageCounter
from pie_async.parsing.events import MakeParser, PlainParser
from pie_async.parsing.reasoning import OPEN, ReasoningParser
from pie_async.sampling_params import SamplingParams


class OpenAIService:
    """Turns request bodies into answers. Safe to share by any number of requests.

    In an ASGI or Ray application: `answer = await service.chat(body)`, then send
    `answer.events()` if `answer.is_streamed`, else `await answer.body()`; an error raised
    before or by these becomes a response through `errors.error_reply`.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        served_model_name: str | None = None,
        keepalive_s: float = 10.0,
        sink: LatencySink | None = None,
    ) -> None:
        """`keepalive_s`: longest silence of a stream before a comment is sent."""
        self._backend = backend
        self._served_model_name = served_model_name
        self._keepalive_s = keepalive_s
        self._sink = sink or NoLatencySink()
        self._created = int(time.time())

    @property
    def _model_name(self) -> str:
        """Asked for with each request: the engine may start after its application was made."""
        return self._served_model_name or self._backend.model.name

    def models(self) -> ModelList:
        """What GET /v1/models answers."""
        return ModelList(data=[self.model(self._model_name)])

    def model(self, name: str) -> ModelCard:
        """What GET /v1/models/{name} answers.

        Raises:
            ModelNotFound: another model is served.
        """
        self._check_model(name)
        return ModelCard(
            id=name, created=self._created, max_model_len=self._backend.model.max_model_len
        )

    async def chat(self, body: bytes) -> Answer:
        """Accept the body of a chat completion request.

        Raises:
            InvalidRequest, ModelNotFound, ContextTooLong, Overloaded, EngineStopped: nothing
                was accepted.
        """
        started_at_s = asyncio.get_running_loop().time()
        request, prompts = await CHAT_READER.read(body)
        self._check_model(request.model)
        asked = ChatAsked.of(request, thinks=self._backend.model.thinks)
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        with respelled(asked.spelling):
            streams = await self._submit(
                request, prompts, asked.params, response_id, chat=asked.options
            )
        writer = ChatWriter(
            response_id=response_id,
            created=int(time.time()),
            model=self._model_name,
            choices=asked.params.n,
            top_logprobs=asked.params.logprobs,
            has_usage=request.wants_usage_chunk,
            make_parser=self._parser_of(asked, streams[0]),
            one_call_only=asked.toolbox.one_only,
        )
        return self._answer(request, response_id, streams, writer, started_at_s)

    async def respond(self, body: bytes) -> Answer:
        """Accept the body of a request for a response: the stateless subset of /v1/responses.

        Raises: as `chat`.
        """
        started_at_s = asyncio.get_running_loop().time()
        request, prompts = await RESPONSES_READER.read(body)
        self._check_model(request.model)
        response_id = f"resp_{uuid.uuid4().hex}"
        with as_responses_say():
            asked = ChatAsked.of(request.chat(), thinks=self._backend.model.thinks)
            with respelled(asked.spelling):
                streams = await self._submit(
                    request, prompts, asked.params, response_id, chat=asked.options
                )
        make_parser = self._parser_of(asked, streams[0]) or PlainParser
        speaker = Speaker(make_parser(), one_call_only=asked.toolbox.one_only)
        response = new_response(request, asked.params, response_id, self._model_name)
        writer = ResponseWriter(response, speaker)
        return self._answer(request, response_id, streams, writer, started_at_s)

    async def tokenize(self, body: bytes) -> Tokens:
        """What POST /tokenize answers.

        Raises:
            InvalidRequest, ModelNotFound, ContextTooLong: naming the field.
        """
        request, prompts = await TOKENIZE_READER.read(body)
        self._check_model(request.model)
        (prompt,) = prompts
        with respelled({"prompt": "prompt" if isinstance(prompt, str) else "messages"}):
            tokens = await self._backend.tokenize(prompt)
        return Tokens(
            count=len(tokens), max_model_len=self._backend.model.max_model_len, tokens=tokens
        )

    async def detokenize(self, body: bytes) -> Text:
        """What POST /detokenize answers.

        Raises:
            InvalidRequest, ModelNotFound: naming the field.
        """
        request, prompts = await DETOKENIZE_READER.read(body)
        self._check_model(request.model)
        (tokens,) = prompts
        decode = functools.partial(self._backend.tokenizer.decode, skip_special_tokens=False)
        return Text(prompt=await asyncio.to_thread(decode, tokens))

    def _parser_of(self, asked: ChatAsked, stream: OutputStream) -> MakeParser | None:
        """What reads the outputs; None: they are content and nothing else."""
        tool_format = self._backend.model.writes_tools_as
        may_think = self._backend.model.thinks and asked.params.structured_outputs is None
        if not may_think:
            return None if asked.toolbox.mode == "none" else asked.tool_parser(tool_format)
        last = self._backend.tokenizer.decode(
            stream.prompt_token_ids[-LAST_TOKENS:], skip_special_tokens=False
        )
        is_thinking = last.rstrip().endswith(OPEN)
        make_rest = asked.tool_parser(tool_format)
        return lambda: ReasoningParser(make_rest(), is_thinking=is_thinking)

    async def completion(self, body: bytes) -> Answer:
        """Accept the body of a completions request: one or several prompts.

        Raises: as `chat`.
        """
        started_at_s = asyncio.get_running_loop().time()
        request, prompts = await COMPLETION_READER.read(body)
        self._check_model(request.model)
        params, spelling = guided(request, request.sampling_params())
        response_id = f"cmpl-{uuid.uuid4().hex}"
        with respelled({None: "prompt", **spelling}):
            streams = await self._submit(request, prompts, params, response_id)
        if request.is_scoring:
            streams = list(map(PromptOnly, streams))
        writer = CompletionWriter(
            response_id=response_id,
            created=int(time.time()),
            model=self._model_name,
            prompts=len(prompts),
            n=params.n,
            echoes=await self._prompt_texts(prompts, streams) if request.echo else None,
            top_logprobs=params.logprobs,
            token_text=self._backend.tokenizer.token_text,
            has_usage=request.wants_usage_chunk,
        )
        return self._answer(request, response_id, streams, writer, started_at_s)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model_name:
            raise ModelNotFound(name, served=self._model_name)

    async def _submit(
        self,
        request: GenerationRequest | ResponsesRequest,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        response_id: str,
        *,
        chat: ChatOptions | None = None,
    ) -> list[OutputStream]:
        streams: list[OutputStream] = []
        try:
            for index, prompt in enumerate(prompts):
                if index:
                    await asyncio.sleep(0)  # short prompts are tokenised on the loop
                name = response_id if len(prompts) == 1 else f"{response_id}-{index}"
                streams.append(await self._submit_one(request, prompt, params, name, chat))
        except BaseException:
            _cancel(streams)
            raise
        return streams

    async def _submit_one(
        self,
        request: GenerationRequest | ResponsesRequest,
        prompt: Prompt,
        params: SamplingParams,
        name: str,
        chat: ChatOptions | None,
    ) -> OutputStream:
        submit = functools.partial(
            self._backend.submit,
            prompt,
            request_id=name,
            priority=request.priority or 0,
            cache_salt=request.cache_salt,
            chat=chat,
        )
        try:
            return await submit(params)
        except ContextTooLong as error:
            if error.param != "max_tokens" or not request.has_default_limit:
                raise
        # The client set no limit, and there is less room than the default: all there is, then.
        return await submit(msgspec.structs.replace(params, max_tokens=None))

    async def _prompt_texts(
        self, prompts: Sequence[Prompt], streams: Sequence[OutputStream]
    ) -> list[str]:
        """Off the loop: decoding a long prompt takes milliseconds."""
        decode = self._backend.tokenizer.decode
        try:
            return [
                prompt
                if isinstance(prompt, str)
                else await asyncio.to_thread(decode, stream.prompt_token_ids)
                for prompt, stream in zip(prompts, streams, strict=True)
            ]
        except BaseException:
            _cancel(streams)
            raise

    def _answer(
        self,
        request: GenerationRequest | ResponsesRequest,
        response_id: str,
        streams: Sequence[OutputStream],
        writer: Writer,
        started_at_s: float,
    ) -> Answer:
        return Answer(
            response_id=response_id,
            feed=OutputFeed(streams),
            writer=writer,
            usage=UsageCounter(sum(len(stream.prompt_token_ids) for stream in streams)),
            latency=RequestLatency(
                self._sink, started_at_s=started_at_s, is_streamed=request.is_streamed
            ),
            is_streamed=request.is_streamed,
            keepalive_s=self._keepalive_s,
        )


def _cancel(streams: Sequence[OutputStream]) -> None:
    for stream in streams:
        stream.cancel()
