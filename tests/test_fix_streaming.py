"""What is streamed can be fixed, and changed, while requests run."""

from __future__ import annotations

import pytest

from pie_async import Engine, SamplingParams
from pie_async.errors import ConfigError

BLOCK_BYTES = 96 * 1024
"""Of the built-in model in float32."""
OPTIONS = {
    "device_kv_bytes": 100 * BLOCK_BYTES,
    "host_pool_bytes": 40 * BLOCK_BYTES,
    "cpu_threads": 1,
    "prefix_caching": False,
}
PROMPT = [10 + i * 17 % 4000 for i in range(200)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)

pytestmark = pytest.mark.realtime


async def tokens_and_streamed(engine: Engine, **fixed) -> tuple[list[int], int]:
    """The tokens of one request, and how many blocks were streamed before its last one."""
    tokens: list[int] = []
    streamed = 0
    if fixed:
        await engine.fix_streaming(fixed["limit"], least_blocks=fixed["least"])
    stream = await engine.submit(PROMPT, GREEDY)
    async for output in stream:
        tokens = list(output.outputs[0].token_ids)
        if output.outputs[0].finish_reason is None:
            streamed = engine.stats().streamed_blocks
    return tokens, streamed


async def test_as_many_blocks_are_streamed_as_asked_for_though_everything_fits():
    async with Engine(**OPTIONS, streamed_blocks=0, debug=True) as engine:
        resident, none = await tokens_and_streamed(engine)
        streamed, seven = await tokens_and_streamed(engine, limit=7, least=7)
        again, none_again = await tokens_and_streamed(engine, limit=0, least=0)
    assert (none, seven, none_again) == (0, 7, 0)
    assert resident == streamed == again


@pytest.mark.parametrize(
    ("options", "limit", "least"),
    [
        ({}, 5, 0),
        ({"streamed_blocks": 0}, 41, 0),
        ({"streamed_blocks": 0}, 3, 4),
        ({"streamed_blocks": 0}, 3, -1),
    ],
)
async def test_what_cannot_be_streamed_is_refused(options, limit, least):
    async with Engine(**OPTIONS, **options) as engine:
        with pytest.raises(ConfigError, match="streamed blocks cannot be fixed"):
            await engine.fix_streaming(limit, least_blocks=least)
