"""Models with random weights: from a shape's name or a config.json alone."""

from __future__ import annotations

import json

import pytest
import torch

from pie_async import LLM, SamplingParams
from pie_async.device.cost_model import SHAPES
from pie_async.errors import ModelError
from pie_async.model.config import ModelConfig, config_of
from pie_async.model.named_shapes import NAMED_SHAPES
from pie_async.model.random_weights import STANDARD_DEVIATION, random_model

TINY = {
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    },
    "opt": {
        "model_type": "opt",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "activation_function": "relu",
    },
}


def tiny(family: str) -> ModelConfig:
    return config_of(TINY[family], family)


def filled(monkeypatch: pytest.MonkeyPatch, family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Parameters by name, copied before `finish` forgets the names."""
    found: dict[str, torch.Tensor] = {}
    from pie_async.model.decoder import Decoder

    finish = Decoder.finish

    def keep(decoder: Decoder) -> None:
        found.update({n: p.clone() for n, p in decoder.parameters.by_name.items()})
        finish(decoder)

    monkeypatch.setattr(Decoder, "finish", keep)
    random_model(tiny(family), torch.float32, torch.device("cpu"), seed=seed)
    monkeypatch.setattr(Decoder, "finish", finish)
    return found


@pytest.mark.parametrize("family", TINY)
def test_matrices_are_random_norms_one_and_biases_zero(monkeypatch, family):
    for name, parameter in filled(monkeypatch, family).items():
        if name.endswith(".bias"):
            assert bool((parameter == 0).all()), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            assert float(parameter.std()) == pytest.approx(STANDARD_DEVIATION, rel=0.1), name


def test_the_seed_decides(monkeypatch):
    one, same, other = (filled(monkeypatch, "llama", seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_named_shapes_are_those_of_the_cost_model(name):
    config, shape = config_of(NAMED_SHAPES[name], name), SHAPES[name]
    for field in (
        "num_layers", "hidden_size", "num_heads", "kv_heads", "head_dim", "intermediate_size",
        "vocab_size", "is_gated",
    ):  # fmt: skip
        assert getattr(config, field) == getattr(shape, field), field


def test_llama_has_as_many_parameters_as_its_model_card_says():
    config = config_of(NAMED_SHAPES["llama-3.1-8b"], "llama-3.1-8b")
    assert config.num_parameters == 8_030_261_248


def test_a_directory_with_a_config_alone_runs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["llama"]))
    with LLM(model=tmp_path, load_format="random", cpu_threads=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        (output,) = llm.generate(["words"], params)
        again = llm.generate([[7] * 9], params)[0]
    assert len(output.outputs[0].token_ids) == 5
    assert len(again.outputs[0].token_ids) == 5


def test_a_shape_without_random_weights_says_how_to_run_it():
    with pytest.raises(ModelError, match=r"llama-3.1-8b is the name of a shape.*random"):
        LLM(model="llama-3.1-8b")
