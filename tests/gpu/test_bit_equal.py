"""Streaming does not change a bit: logits with and without it, for the same batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.composed import run

from pie_async import SamplingParams
from pie_async.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = {"float32": 96 * 1024, "bfloat16": 48 * 1024}
"""Of the built-in model: 16 tokens, 6 layers."""
ASK = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True, logprobs=20)


def prompt(number: int, length: int) -> list[int]:
    return [10 + (number * 131 + i * 17) % 4000 for i in range(length)]


BATCH = [prompt(number, 24 + 9 * number) for number in range(6)]
LONG = [prompt(3, 280)]


def engine_options(device: str, device_blocks: int, host_blocks: int, **more) -> dict:
    options = {"device": device, "dtype": "float32", "prefix_caching": False, **more}
    options |= {"cpu_threads": 1} if device == "cpu" else {"attention": "triton"}
    block_bytes = BLOCK_BYTES[options["dtype"]]
    options |= {"device_kv_bytes": device_blocks * block_bytes}
    return options | {"host_pool_bytes": host_blocks * block_bytes}


async def with_and_without(device: str, prompts: list[list[int]], pooled: dict, **both):
    """Two runs, whose batches are the same; only the first one streams."""
    roomy = await run(prompts, ASK, **engine_options(device, 400, 0, **both))
    streaming = {"device_blocks": 400, "host_blocks": 200, **pooled, **both}
    least = streaming.pop("least_blocks", 0)
    tight = await run(prompts, ASK, least_blocks=least, **engine_options(device, **streaming))
    assert tight.compositions == roomy.compositions
    assert roomy.num_staged == 0
    assert tight.num_staged > 20, "it hardly streamed"
    return tight, roomy


CASES = {
    "a batch, its sealed blocks streamed": (BATCH, {"least_blocks": 12, "streamed_blocks": 100}),
    # Alone and in chunks of one block, it is computed in the same pieces however late slots come.
    "a sequence four times the arena": (LONG, {"device_blocks": 5, "host_blocks": 30}),
}


@pytest.mark.realtime
@pytest.mark.parametrize("case", CASES)
async def test_on_the_cpu_every_logit_is_the_same(case: str, monkeypatch: pytest.MonkeyPatch):
    kept: list[torch.Tensor] = []
    plain = Decoder.logits

    def keep(decoder: Decoder, x: torch.Tensor) -> torch.Tensor:
        kept.append(plain(decoder, x))
        return kept[-1].clone()  # sampling may work in place

    monkeypatch.setattr(Decoder, "logits", keep)
    prompts, pooled = CASES[case]
    tight, roomy = await with_and_without("cpu", prompts, pooled, token_budget=16 * len(prompts))
    assert tight.tokens == roomy.tokens
    assert tight.logprobs == roomy.logprobs
    assert len(kept) % 2 == 0
    half = len(kept) // 2
    for mine, theirs in zip(kept[half:], kept[:half], strict=True):
        assert mine.numpy().tobytes() == theirs.numpy().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "launched"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
async def test_on_a_gpu_the_likeliest_tokens_have_the_same_logprobs(
    case: str, dtype: str, cuda_graphs: bool
) -> None:
    """To the last bit, each a function of its row's logits. Graphs for whole iterations and for
    layer groups launch the same kernels; attention of prompts is Triton's with either."""
    prompts, pooled = CASES[case]
    tight, roomy = await with_and_without(
        "cuda",
        prompts,
        pooled,
        token_budget=16 * len(prompts),
        dtype=dtype,
        cuda_graphs=cuda_graphs,
    )
    assert tight.tokens == roomy.tokens
    assert tight.logprobs == roomy.logprobs
