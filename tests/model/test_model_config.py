"""config.json is understood completely, or refused by the name of what is not."""

from __future__ import annotations

import json

import pytest
import transformers

from pie_async.errors import ModelError, UnsupportedModel
from pie_async.model.config import read_config
from pie_async.model.rope import inverse_frequencies
from tests.support.checkpoints import LLAMA, VARIANTS

LLAMA_3_1 = {  # as published, in the spelling of transformers 4
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
OPT_350M = {
    "_name_or_path": "opt-350m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.20.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
SMALL = {**LLAMA, "model_type": "llama"}


def read(path, values, **changes):
    values = {k: v for k, v in {**values, **changes}.items() if v != "absent"}
    (path / "config.json").write_text(json.dumps(values))
    return read_config(path)


def test_published_llama_3_1_is_read(tmp_path):
    config = read(tmp_path, LLAMA_3_1)
    assert (config.family, config.num_layers, config.kv_heads, config.head_dim) == (
        "llama",
        32,
        8,
        128,
    )
    assert config.max_positions == 131072
    assert config.eos_ids == (128001, 128008, 128009)
    assert config.dtype == "bfloat16"
    assert config.num_parameters == 8_030_261_248  # as its model card says


def test_published_opt_350m_is_read(tmp_path):
    config = read(tmp_path, OPT_350M)
    assert not config.is_pre_norm
    assert not config.has_final_norm
    assert (config.embedding_size, config.hidden_size) == (512, 1024)
    assert config.is_tied
    assert config.num_parameters == 331_196_416


def test_generation_config_adds_its_end_of_sequence_ids(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert read(tmp_path, SMALL, eos_token_id=7).eos_ids == (5, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "xielu"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"torch_dtype": "float8_e4m3fn"},
        {"sliding_window": 128},
        {"layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["chunked_attention"] * 3},
        {"num_experts": 8},
        {"logit_softcap": 30.0},
        {"rope_interleaved": True},
        {"model_type": "qwen2", "attention_bias": False},
        {"model_type": "mistral", "attention_bias": True},
        {"model_type": "opt", "ffn_dim": 48, "intermediate_size": 48},
    ],
    ids=lambda change: ",".join(map(str, change)),
)
def test_unsupported_feature_is_refused_by_name(tmp_path, change):
    with pytest.raises(UnsupportedModel) as caught:
        read(tmp_path, SMALL, **change)
    assert caught.value.feature == list(change)[-1]
    assert caught.value.feature in str(caught.value)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "feature"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type"),
        ({"type": "su", "factor": 2.0}, "rope_type"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)
def test_unsupported_rope_is_refused_by_name(tmp_path, spelling, rope, feature):
    with pytest.raises(UnsupportedModel) as caught:
        read(tmp_path, SMALL, **{spelling: rope})
    assert caught.value.feature == f"{spelling}.{feature}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -1),
        ("hidden_size", 10**9),
        ("hidden_size", 32.5),
        ("hidden_size", "absent"),
        ("num_hidden_layers", True),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("vocab_size", None),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", "small"),
        ("rope_theta", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", [1, -4]),
        ("layer_types", ["full_attention"]),
    ],
)
def test_impossible_value_is_refused_with_the_fields_name(tmp_path, field, value):
    with pytest.raises(ModelError, match=field):
        read(tmp_path, SMALL, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("factor", float("nan")), ("factor", -2), ("factor", None), ("low_freq_factor", 9.0)],
)
def test_impossible_rope_number_is_refused_with_the_fields_name(tmp_path, field, value):
    rope = {**LLAMA_3_1["rope_scaling"], field: value}
    with pytest.raises(ModelError, match=r"rope_scaling\.(high_|low_freq_)?f"):
        read(tmp_path, SMALL, rope_scaling=rope)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"use_mrope": False, "rope_scaling": None, "unsloth_version": "2024.9"},
        {"id2label": {"0": "LABEL_0"}, "layer_types": ["full_attention"] * 3},
    ],
    ids=str,
)
def test_harmless_fields_are_let_through(tmp_path, change):
    assert read(tmp_path, SMALL, **change) == read(tmp_path, SMALL)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "[" * 100_000, "\x00"])
def test_damaged_config_is_one_clear_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        read_config(tmp_path)


def test_missing_config_is_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        read_config(tmp_path)


ROPES = sorted(name for name, (_, extra) in VARIANTS.items() if "rope_parameters" in extra)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("is_old_spelling", [False, True])
def test_rope_frequencies_are_transformers_own(tmp_path, name, is_old_spelling):
    extra = VARIANTS[name][1]
    rope = extra["rope_parameters"]
    changes = dict(extra)
    if is_old_spelling:
        del changes["rope_parameters"]
        old = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
        changes |= {"rope_scaling": {"type": rope["rope_type"], **old}, "rope_theta": 10_000.0}
    config = read(tmp_path, SMALL, **changes)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(**{**LLAMA, **extra})
    )
    ours = inverse_frequencies(config.rope, config.head_dim)
    assert ours.tolist() == pytest.approx(theirs.inv_freq.tolist(), rel=2e-6)
    assert config.rope.attention_factor == pytest.approx(theirs.attention_scaling)
