"""A full-sized model's logits: as close to float32 as plain torch gets in the same dtype."""

from __future__ import annotations

import pytest
import torch

from pie_async.core.layout import KvLayout
from pie_async.messages import LaneBinding, Row, RunIteration, TableUpdate
from pie_async.model.runner import ModelRunner
from pie_async.sampling_params import SamplingParams

PROMPT_TOKENS = 300
GREEDY = SamplingParams(temperature=0.0)
BLOCKS = -(-PROMPT_TOKENS // 16) + 1


def logits_of(runner, decode, kept: list[torch.Tensor]) -> torch.Tensor:
    """[8, vocab] of a prompt's end and of 7 decode iterations with given tokens."""
    binding = LaneBinding(
        lane=0, sequence=0, sampling=GREEDY, seed=0, stop_ids=(), prompt_len=PROMPT_TOKENS
    )
    table = TableUpdate(0, 0, tuple(range(BLOCKS)))
    rows = [Row(0, 0, 0, tuple((7 * i) % 1000 for i in range(PROMPT_TOKENS)), True)]
    rows += [Row(0, 0, PROMPT_TOKENS + i, (50 + i,), True) for i in range(decode)]
    for number, row in enumerate(rows):
        first = number == 0
        command = RunIteration(
            iteration=number,
            rows=(row,),
            bindings=(binding,) if first else (),
            tables=(table,) if first else (),
        )
        forward = runner.begin(command)
        runner.run_layers(forward, range(32))
        runner.sample(forward)
        forward.collect()
    return torch.cat(kept).float()


@pytest.mark.gpu
def test_logits_of_a_full_shape_are_within_the_dtypes_error() -> None:
    from pie_async.cuda import fused_decoder
    from pie_async.cuda.fused_runner import FusedRunner
    from pie_async.model.config import config_of
    from pie_async.model.decoder import Decoder
    from pie_async.model.named_shapes import NAMED_SHAPES
    from pie_async.model.random_weights import random_model

    config = config_of(NAMED_SHAPES["llama-3.1-8b"], "llama-3.1-8b")
    device = torch.device("cuda")

    def found(kind: str, decoder: Decoder) -> torch.Tensor:
        shape = (BLOCKS, 2, 8, 16, 128)
        kv = [torch.zeros(shape, dtype=decoder.dtype, device=device) for _ in range(32)]
        kept: list[torch.Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            owner = fused_decoder.FusedDecoder if kind == "fused" else Decoder
            plain = owner.logits
            patch.setattr(owner, "logits", lambda *a: kept.append(plain(*a)) or kept[-1])
            how = {"lanes": 4, "max_blocks": BLOCKS}
            if kind == "plain":
                runner = ModelRunner(decoder, kv, block_tokens=16, **how)
            else:
                layout = KvLayout(
                    num_layers=32, block_tokens=16, kv_heads=8, head_dim=128, item_bytes=2,
                    num_groups=32, ring_depth=2,
                )  # fmt: skip
                runner = FusedRunner(decoder, kv, layout, max_tokens=512, uses_graphs=False, **how)
            return logits_of(runner, 7, kept)

    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
        decoder = random_model(config, torch.bfloat16, device, seed=1)
        fused, plain = found("fused", decoder), found("plain", decoder)
        exact_model = Decoder(config, torch.float32, device)
        _copy(decoder, exact_model)
        exact = found("plain", exact_model)
        distances = [(x - exact).norm() / exact.norm() for x in (fused, plain)]
        error, plain_error = torch.stack(distances).tolist()
    assert 0 < error < 1.5 * plain_error
    assert error < 0.1


def _copy(source, target) -> None:
    """The same numbers in another dtype."""
    pairs = [(source.embedding, target.embedding), (source.head, target.head)]
    pairs.append((source.final_norm.weight, target.final_norm.weight))
    for mine, theirs in zip(source.layers, target.layers, strict=True):
        parts = ("attention_norm", "qkv", "out", "mlp_norm")
        pairs += [(getattr(mine, part).weight, getattr(theirs, part).weight) for part in parts]
        pairs += [(mine.mlp.up.weight, theirs.mlp.up.weight)]
        pairs += [(mine.mlp.down.weight, theirs.mlp.down.weight)]
    for from_, to in pairs:
        to.copy_(from_)
