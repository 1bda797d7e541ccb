"""The runner made of kernels gives the tokens of the one in plain torch, and of transformers."""

from __future__ import annotations

import pytest
import torch

from pie_async.core.layout import KvLayout
from pie_async.cuda.fused_runner import FusedRunner
from pie_async.model import decoder as decoder_module
from pie_async.model import layers as layers_module
from pie_async.model.config import read_config
from pie_async.model.weights import load_model
from pie_async.sampling_params import SamplingParams
from tests.support.checkpoints import VARIANTS, greedy, write_checkpoint
from tests.support.direct_runner import DirectRunner

INTERPRETED = ["llama", "mistral-window", "qwen3", "opt-post-norm-projected"]
"""Variants that between them take every branch; the interpreter is slow."""
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [7], list(range(2, 23))]


@pytest.fixture(params=sorted(VARIANTS))
def peer(request, tmp_path, device, monkeypatch):
    """A decoder and the transformers model it was read from."""
    if device.type == "cpu" and request.param not in INTERPRETED:
        pytest.skip("interpreted for a few variants only")
    # What oneDNN packs, the kernels could not read.
    for module in (decoder_module, layers_module):
        monkeypatch.setattr(module, "pack_linear", lambda weight, bias: None)
    checkpoint = write_checkpoint(tmp_path, request.param)
    path = checkpoint.path
    return load_model(path, read_config(path), torch.float32, device), checkpoint.model.to(device)


def fused(decoder, **how):
    def make_runner(decoder, kv, *, lanes, max_blocks, block_tokens):
        config = decoder.config
        layout = KvLayout(
            num_layers=config.num_layers,
            block_tokens=block_tokens,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            item_bytes=4,
            num_groups=config.num_layers,
            ring_depth=2,
        )
        return FusedRunner(
            decoder,
            kv,
            layout,
            lanes=lanes,
            max_blocks=max_blocks,
            max_tokens=128,
            uses_graphs=decoder.device.type == "cuda",
        )

    return DirectRunner(decoder, make_runner=make_runner, **how)


def test_greedy_tokens_are_those_of_transformers(peer) -> None:
    """Together, their prompts in chunks, so that decode rows and chunks mix."""
    decoder, model = peer
    expected = [greedy(model, prompt, 6)[0] for prompt in PROMPTS]
    assert fused(decoder).generate(PROMPTS, 6, chunk=8) == expected


@pytest.mark.parametrize("peer", ["qwen3"], indirect=True)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=0.5, repetition_penalty=1.3, logit_bias={5: 3.0}),
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, min_tokens=3),
    ],
    ids=["drawn", "truncated", "edited", "scored"],
)
def test_every_way_of_sampling_gives_the_same_reports(peer, sampling) -> None:
    decoder, _ = peer

    def reports(runner):
        bindings = [runner.submit(lane, prompt, sampling) for lane, prompt in enumerate(PROMPTS)]
        found = [runner.iterate(range(len(PROMPTS)), bindings=bindings)]
        found += [runner.iterate(range(len(PROMPTS))) for _ in range(4)]
        tokens = {(t.sequence, i): t for i, (sampled, _) in enumerate(found) for t in sampled}
        scores = {s.sequence: s for _, scored in found for s in scored}
        return tokens, scores

    (mine, my_scores), (theirs, their_scores) = (
        reports(fused(decoder)),
        reports(DirectRunner(decoder)),
    )
    assert {key: t.token for key, t in mine.items()} == {k: t.token for k, t in theirs.items()}
    for key, token in mine.items():
        assert token.logprob == pytest.approx(theirs[key].logprob, abs=1e-4)
        assert [t for t, _ in token.top] == [t for t, _ in theirs[key].top]
    assert my_scores.keys() == their_scores.keys()
    for key, scores in my_scores.items():
        for a, b in zip(scores.tokens, their_scores[key].tokens, strict=True):
            assert (a.token, a.rank) == (b.token, b.rank)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
