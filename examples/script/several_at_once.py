"""A plain asyncio script: several texts at once, one of them in a form, one of them given up.

python examples/script/several_at_once.py
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import aclosing

from pie_async import Engine, SamplingParams, StructuredOutputs


async def write(engine: Engine, prompt: str, params: SamplingParams) -> str:
    """All of the text, printed while it comes."""
    text = ""
    async with aclosing(engine.generate(prompt, params)) as outputs:
        async for output in outputs:
            piece = output.outputs[0].text
            text += piece
            print(f"{prompt.strip():>8} | {piece!r}")
    return text


async def write_in_time(engine: Engine, prompt: str, seconds: float) -> str | None:
    """The text, or None if it takes too long: leaving `timeout` cancels the request."""
    try:
        async with asyncio.timeout(seconds):
            return await write(engine, prompt, SamplingParams(max_tokens=4000, output_kind="delta"))
    except TimeoutError:
        return None


async def main(**options: object) -> tuple[str, str, str | None]:
    """A free text, a choice between two, and one that must be quick."""
    async with Engine(**options) as engine:
        free = SamplingParams(max_tokens=20, temperature=0.8, seed=1, output_kind="delta")
        form = StructuredOutputs(choice=["to be", "not to be"])
        chosen = SamplingParams(max_tokens=20, structured_outputs=form, output_kind="delta")
        return await asyncio.gather(
            write(engine, "ROMEO:\n", free),
            write(engine, "HAMLET:\n", chosen),
            write_in_time(engine, "OTHELLO:\n", seconds=1.0),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "sim"])
    print(asyncio.run(main(device=parser.parse_args().device)))
