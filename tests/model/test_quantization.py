"""FP8 checkpoints as others write them, and quantising while loading."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_checkpoint

from pie_async.errors import ModelError, UnsupportedModel, WeightsError
from pie_async.model.config import read_config
from pie_async.model.fp8 import FP8, quantize, widen
from pie_async.model.quantization import WHILE_LOADING, Quantization
from pie_async.model.weights import load_model

CPU = torch.device("cpu")
QUANTISED = ("_proj.weight",)


def scheme(strategy: str, **more):
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


def compressed(strategy: str = "channel", inputs=None, *, group=None, weights=None, **more):
    """A quantization_config as llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": inputs or scheme("token", dynamic=True),
                "output_activations": None,
                "weights": {**scheme(strategy, dynamic=False), **(weights or {})},
                **(group or {}),
            }
        },
        **more,
    }


FBGEMM = {
    "quant_method": "fbgemm_fp8",
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
}
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path, "llama").path


def describe(path, quantization) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def store(path, *, by_tensor: bool, shape: tuple[int, ...], dtype, ignored: str = "-"):
    """Quantise a checkpoint's linear layers in place; returns them widened again."""
    file = path / "model.safetensors"
    tensors, plain = load_file(file), {}
    for name in [name for name in tensors if name.endswith(QUANTISED) and ignored not in name]:
        numbers, scale = quantize(tensors[name])
        if by_tensor:
            scale = scale.max().expand_as(scale)
            numbers = (tensors[name] / scale[:, None]).to(FP8)
        scale = scale.to(dtype)
        tensors[name] = numbers
        plain[name] = widen(numbers, scale, torch.float32)
        stored = scale[:1] if by_tensor else scale
        tensors[name + "_scale"] = stored.reshape(shape).contiguous()
        tensors[name.replace("weight", "input_scale")] = torch.ones(1)
    save_file(tensors, file)
    return plain


def parameters(decoder):
    """The first layer's linear weights by checkpoint name, widened."""
    layer, names = decoder.layers[0], {}
    for linear, parts in (
        (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (layer.mlp.down, ("mlp.down_proj",)),
    ):
        assert linear.weight.dtype == FP8
        whole, first = widen(linear.weight, linear.scale, torch.float32), 0
        for part in parts:
            rows = {"self_attn.k_proj": 16, "self_attn.v_proj": 16}.get(part, 32)
            names[f"model.layers.0.{part}.weight"] = whole[first : first + rows]
            first += rows
        assert first == len(whole)
    return names


@pytest.mark.parametrize(
    ("quantization", "by_tensor", "shape"),
    [
        (compressed("channel"), False, (-1, 1)),
        (compressed("tensor", scheme("tensor", dynamic=False)), True, (1,)),
        (compressed("tensor", format="naive-quantized"), True, ()),
        (FBGEMM, False, (-1, 1)),
        (AUTO_FP8, True, ()),
    ],
    ids=["channel", "tensor", "naive", "fbgemm", "autofp8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_scales_are_read(checkpoint, quantization, by_tensor, shape, dtype) -> None:
    describe(checkpoint, quantization)
    ignored = "layers.1.mlp" if quantization is FBGEMM else "-"
    expected = store(checkpoint, by_tensor=by_tensor, shape=shape, dtype=dtype, ignored=ignored)
    decoder = load_model(checkpoint, read_config(checkpoint), torch.float32, CPU)
    for name, weight in parameters(decoder).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    assert (decoder.layers[1].mlp.up.scale is None) == (quantization is FBGEMM)
    x = torch.randn(3, 48)
    torch.testing.assert_close(
        decoder.layers[0].mlp.down(x), x @ expected["model.layers.0.mlp.down_proj.weight"].T
    )


def test_quantising_while_loading_is_near_and_leaves_the_rest(checkpoint) -> None:
    config = read_config(checkpoint)
    plain = load_file(checkpoint / "model.safetensors")
    quantised = msgspec.structs.replace(config, quantization=WHILE_LOADING)
    decoder = load_model(checkpoint, quantised, torch.bfloat16, CPU)
    for name, weight in parameters(decoder).items():
        error = (weight - plain[name]).norm() / plain[name].norm()
        assert error < 0.04
    assert torch.equal(decoder.head, plain["lm_head.weight"].bfloat16())
    assert decoder.embedding.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(3))
def test_quantised_numbers_are_within_half_a_step(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 33, generator=generator) * torch.logspace(-6, 4, 7)[:, None]
    weight[3] = 0
    numbers, scale = quantize(weight)
    error = (widen(numbers, scale, torch.float64) - weight).abs()
    # Three bits behind the point, and subnormals in steps of 2**-9.
    assert (error <= weight.abs() / 16 * 1.001 + scale[:, None] * 2**-10 * 1.001).all()


def test_config_says_what_is_quantised(checkpoint) -> None:
    describe(checkpoint, compressed("tensor", ignore=["lm_head", "re:.*down_proj$"]))
    quantization = read_config(checkpoint).quantization
    assert quantization == Quantization(scales="tensor", ignored=("lm_head", "*down_proj"))
    assert not quantization.includes("model.layers.2.mlp.down_proj")
    assert quantization.includes("model.layers.2.mlp.up_proj")
    weights_only = compressed(group={"input_activations": None})
    describe(checkpoint, weights_only)
    assert not read_config(checkpoint).quantization.quantizes_activations


@pytest.mark.parametrize(
    ("quantization", "feature"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantization_config"),
        (compressed(format="pack-quantized"), "format"),
        (compressed("group"), "strategy"),
        (compressed("block"), "strategy"),
        (compressed(weights={"type": "int"}), "type"),
        (compressed(weights={"num_bits": 4}), "type"),
        (compressed(weights={"symmetric": False}), "symmetric"),
        (compressed(inputs=scheme("group")), "strategy"),
        (compressed(group={"targets": ["Linear", "Embedding"]}), "targets"),
        (compressed(group={"output_activations": scheme("token")}), "output_activations"),
        (compressed(config_groups={"a": {}, "b": {}}), "config_groups"),
        (compressed(kv_cache_scheme=scheme("tensor")), "kv_cache_scheme"),
        (compressed(ignore=["re:model\\.(a|b)+c"]), "ignore"),
        ({**AUTO_FP8, "weight_block_size": [128, 128]}, "weight_block_size"),
    ],
)
def test_other_quantisation_is_refused_by_name(checkpoint, quantization, feature) -> None:
    describe(checkpoint, quantization)
    with pytest.raises(UnsupportedModel, match="quantization_config") as caught:
        read_config(checkpoint)
    assert caught.value.feature == feature


@pytest.mark.parametrize(
    "quantization",
    [
        [],
        {"bits": 8},
        compressed(ignore="lm_head"),
        compressed(group={"weights": None}),
        compressed(config_groups={"group_0": 3}),
    ],
    ids=str,
)
def test_damaged_quantization_config_is_named(checkpoint, quantization) -> None:
    describe(checkpoint, quantization)
    with pytest.raises(ModelError, match=r"config\.json: quantization_config"):
        read_config(checkpoint)


def test_quantising_a_part_of_a_fused_layer_is_refused(checkpoint) -> None:
    describe(checkpoint, compressed(ignore=["lm_head", "model.layers.0.self_attn.k_proj"]))
    store(checkpoint, by_tensor=False, shape=(-1, 1), dtype=torch.float32)
    with pytest.raises(UnsupportedModel, match="k_proj"):
        load_model(checkpoint, read_config(checkpoint), torch.float32, CPU)


def test_fp8_numbers_that_no_config_explains_are_refused(checkpoint) -> None:
    store(checkpoint, by_tensor=False, shape=(-1, 1), dtype=torch.float32)
    with pytest.raises(WeightsError, match="weight_scale"):
        load_model(checkpoint, read_config(checkpoint), torch.float32, CPU)
    describe(checkpoint, compressed(ignore=["model"]))
    tensors = load_file(checkpoint / "model.safetensors")
    plain = {name: each for name, each in tensors.items() if not name.endswith("_scale")}
    save_file(plain, checkpoint / "model.safetensors")
    with pytest.raises(WeightsError, match="F8_E4M3 where float32 belongs"):
        load_model(checkpoint, read_config(checkpoint), torch.float32, CPU)


def test_missing_scales_are_named(checkpoint) -> None:
    describe(checkpoint, compressed())
    with pytest.raises(WeightsError, match=r"missing .*weight_scale"):
        load_model(checkpoint, read_config(checkpoint), torch.float32, CPU)
