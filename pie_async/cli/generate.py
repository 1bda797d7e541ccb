"""`pie-async generate`: text to standard output as it comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pie_async.cli.options import MODEL, count, with_engine_flags
from pie_async.cli.running import run_async, started
from pie_async.config import BUILTIN_MODEL, EngineConfig
from pie_async.errors import ConfigError
from pie_async.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pie_async.engine import Engine

_PANEL = "Text"


@with_engine_flags
def generate(
    *,
    model: MODEL = BUILTIN_MODEL,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", rich_help_panel=_PANEL,
                     help="The prompt; without it, standard input is."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", rich_help_panel=_PANEL,
                     help="Treat the prompt as a message to answer; `pie-async chat` converses."),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", rich_help_panel=_PANEL,
                     help="System message in front of a --chat."),
    ] = None,
    max_tokens: Annotated[
        str,
        typer.Option("--max-tokens", "-n", parser=count, metavar="N", rich_help_panel=_PANEL,
                     help="Most output tokens."),
    ] = "256",
    temperature: Annotated[
        float, typer.Option(rich_help_panel=_PANEL, help="0 is greedy.")
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(rich_help_panel=_PANEL, help="Keep the likeliest tokens up to this sum."),
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option(rich_help_panel=_PANEL, help="Keep the k likeliest; 0 keeps all.")
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", rich_help_panel=_PANEL, help="End here; may be repeated."),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", rich_help_panel=_PANEL, help="Go on past the model's end."),
    ] = False,
    engine: EngineConfig,
) -> int:  # fmt: skip
    """Continue a prompt, or answer a message, with MODEL; the text streams to standard output.

    The same --seed gives the same text.
    """
    del model
    if system is not None and not chat:
        raise ConfigError("--system needs --chat", option="system")
    params = SamplingParams(
        max_tokens=int(max_tokens),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        output_kind="delta",
    )
    opening = [{"role": "system", "content": system}] if system is not None else []
    text = prompt if prompt is not None else _read_prompt()
    return run_async(_answer_once(engine, params, [*opening, _user(text)] if chat else text))


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise ConfigError(
            "give a prompt with --prompt or on standard input; `pie-async chat` converses",
            option="prompt",
        )
    text = sys.stdin.read()
    if not text:
        raise ConfigError("standard input is empty; give a prompt there or with --prompt",
                          option="prompt")  # fmt: skip
    return text


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def _answer_once(
    config: EngineConfig, params: SamplingParams, prompt: str | Sequence[dict[str, str]]
) -> int:
    async with started(config) as engine:
        await _stream(engine, prompt, params)
        _write("\n")
    return 0


async def _stream(engine: Engine, prompt: Any, params: SamplingParams) -> None:
    async with aclosing(engine.generate(prompt, params)) as outputs:
        async for output in outputs:
            for choice in output.outputs:
                _write(choice.text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
