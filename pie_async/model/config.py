"""What a model is, read from its config.json: every feature known, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from pie_async.model.config_fields import Fields, read_json_object
from pie_async.model.quantization import Quantization, read_quantization
from pie_async.model.rope_config import RopeConfig, read_rope

Family = Literal["llama", "mistral", "qwen2", "qwen3", "opt"]
ModelDtype = Literal["float32", "float16", "bfloat16"]

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DTYPES: dict[str, ModelDtype] = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
}

# Fields that cannot change what a forward pass computes, whatever they hold.
_HARMLESS_NAMES = """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path
    activation_dropout architectures attention_dropout attn_implementation auto_map
    bad_words_ids bos_token bos_token_id chunk_size_feed_forward decoder_start_token_id dropout
    eos_token finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label init_std initializer_range is_llama_config keys_to_ignore_at_inference label2id
    layerdrop learned_embeddings max_length max_window_layers neftune_noise_alpha
    output_attentions output_hidden_states output_past output_projection pad_token pad_token_id
    prefix pretraining_tp problem_type return_dict return_dict_in_generate sep_token_id
    task_specific_params temperature tokenizer_class top_k top_p torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache
    use_return_dict vocab_file
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder, in the terms in which `Decoder` builds it."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    """Longest context, with RoPE scaling counted in."""
    eos_ids: tuple[int, ...]
    dtype: ModelDtype
    """What the checkpoint says it is stored in."""
    rope: RopeConfig | None
    """None: learned positions."""
    activation: Activation
    is_gated: bool
    """MLP: down(act(gate(x)) * up(x)); otherwise down(act(up(x)))."""
    norm: Literal["rms", "layer"]
    norm_eps: float
    windows: tuple[int | None, ...]
    """Per layer: how many positions back attention sees, its own counted; None: all."""
    embedding_size: int
    """Width of the token embedding; projected when it is not `hidden_size`."""
    is_norm_affine: bool = True
    is_pre_norm: bool = True
    """Norms before attention and MLP; otherwise after each residual sum."""
    has_final_norm: bool = True
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    """Attention's output projection."""
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    is_tied: bool = False
    """The output layer is the token embedding."""
    quantization: Quantization | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint, a tied output layer counted once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        norm = 0
        if self.is_norm_affine:
            norm = hidden if self.norm == "rms" else 2 * hidden
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = hidden * (queries + 2 * keys) + queries * hidden
        attention += (queries + 2 * keys) * self.has_qkv_bias + hidden * self.has_out_bias
        attention += 2 * self.head_dim * self.has_qk_norm
        ups = 2 if self.is_gated else 1
        mlp = (ups + 1) * hidden * inner + (ups * inner + hidden) * self.has_mlp_bias
        embedding = self.vocab_size * self.embedding_size * (1 if self.is_tied else 2)
        if self.rope is None:
            embedding += (self.max_positions + OPT_POSITION_OFFSET) * hidden
        if self.embedding_size != hidden:
            embedding += 2 * self.embedding_size * hidden
        layers = self.num_layers * (attention + mlp + 2 * norm)
        return layers + embedding + norm * self.has_final_norm

    def weight_bytes(self, item_bytes: int) -> int:
        """What the parameters take, scales not counted.

        Args:
            item_bytes: of those that are not quantised.
        """
        if self.quantization is None:
            return self.num_parameters * item_bytes
        tables = 1 if self.is_tied else 2
        embedding = self.vocab_size * self.embedding_size * tables
        return self.num_parameters + embedding * (item_bytes - 1)


OPT_POSITION_OFFSET = 2
"""OPT's position p is row p + 2 of its position embedding."""


def read_config(path: Path) -> ModelConfig:
    """The model in a Hugging Face directory; runs no code from it (`auto_map` is ignored).

    Raises:
        UnsupportedModel: a feature that is not computed here; `feature` is its field's name.
        ModelError: config.json is missing or damaged, or a number in it cannot be; names it.
    """
    values = read_json_object(path / "config.json")
    return config_of(values, str(path / "config.json"), more_eos_ids=_generation_eos_ids(path))


def config_of(
    values: Mapping[str, Any], where: str, *, more_eos_ids: tuple[int, ...] = ()
) -> ModelConfig:
    """The model that the fields of a config.json describe; raises as `read_config`.

    Args:
        where: what errors call it.
    """
    fields = Fields(values, where)
    family = fields.text("model_type")
    if family not in _READERS:
        raise fields.unsupported(
            "model_type", f"{family!r} is not supported, only {', '.join(_READERS)}"
        )
    architecture, reader = _READERS[family]
    for each in fields.value("architectures") or ():
        if each != architecture:
            raise fields.unsupported(
                "architectures", f"{each!r} is not supported, only {architecture}"
            )
    eos_ids = tuple(dict.fromkeys((*more_eos_ids, *fields.token_ids("eos_token_id"))))
    config = msgspec.structs.replace(
        reader(fields, eos_ids), quantization=read_quantization(fields)
    )
    _refuse_unread(fields)
    return config


def _generation_eos_ids(path: Path) -> tuple[int, ...]:
    """Of generation_config.json, which in chat models knows more of them."""
    file = path / "generation_config.json"
    return (
        Fields(read_json_object(file), str(file)).token_ids("eos_token_id")
        if file.is_file()
        else ()
    )


def _refuse_unread(fields: Fields) -> None:
    for name, value in fields.unread().items():
        # An unknown feature that is switched off is no feature.
        if name in _HARMLESS or value in (None, False, 0, "", [], {}):
            continue
        raise fields.unsupported(name, f"= {value!r} asks for something that is not supported")


def _read_llama(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    has_bias = fields.flag("attention_bias", False)
    common = _read_rope_decoder(fields, eos_ids, kv_heads=None)
    _refuse_window(fields)
    return ModelConfig(
        family="llama",
        **common,
        windows=(None,) * common["num_layers"],
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_mlp_bias=fields.flag("mlp_bias", False),
    )


def _read_mistral(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    common = _read_rope_decoder(fields, eos_ids, kv_heads=8)
    window = _window(fields)
    if window is None and not fields.has("sliding_window"):
        window = 4096
    windows = _by_layer_types(fields, window) or (window,) * common["num_layers"]
    if len(set(windows)) > 1 or windows[0] != window:
        raise fields.unsupported("layer_types", "that contradict sliding_window are not supported")
    return ModelConfig(family="mistral", **common, windows=windows)


def _read_qwen2(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    common = _read_rope_decoder(fields, eos_ids, kv_heads=32)
    if not fields.flag("attention_bias", True):
        raise fields.unsupported("attention_bias", "false is not supported for Qwen2")
    windows = _qwen_windows(fields, common["num_layers"])
    return ModelConfig(family="qwen2", **common, windows=windows, has_qkv_bias=True)


def _read_qwen3(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    has_bias = fields.flag("attention_bias", False)
    head_dim = None if fields.has("head_dim") else 128
    common = _read_rope_decoder(fields, eos_ids, kv_heads=32, head_dim=head_dim)
    return ModelConfig(
        family="qwen3",
        **common,
        windows=_qwen_windows(fields, common["num_layers"]),
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_qk_norm=True,
    )


def _read_opt(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    common = _read_sizes(fields, eos_ids)
    has_bias = fields.flag("enable_bias", True)
    is_pre_norm = fields.flag("do_layer_norm_before", True)
    hidden = common["hidden_size"]
    heads = common["num_heads"]
    return ModelConfig(
        family="opt",
        **common,
        intermediate_size=fields.integer("ffn_dim", high=2**20),
        kv_heads=heads,
        head_dim=_head_dim(fields, hidden, heads),
        max_positions=fields.integer("max_position_embeddings", high=2**27),
        rope=None,
        activation=_activation(fields, "activation_function", "relu"),
        is_gated=False,
        norm="layer",
        norm_eps=1e-5,
        windows=(None,) * common["num_layers"],
        embedding_size=fields.integer("word_embed_proj_dim", hidden, high=2**17),
        is_norm_affine=fields.flag("layer_norm_elementwise_affine", True),
        is_pre_norm=is_pre_norm,
        has_final_norm=is_pre_norm and not fields.flag("_remove_final_layer_norm", False),
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_mlp_bias=has_bias,
        is_tied=fields.flag("tie_word_embeddings", True),
    )


_READERS: dict[str, tuple[str, Callable[[Fields, tuple[int, ...]], ModelConfig]]] = {
    "llama": ("LlamaForCausalLM", _read_llama),
    "mistral": ("MistralForCausalLM", _read_mistral),
    "qwen2": ("Qwen2ForCausalLM", _read_qwen2),
    "qwen3": ("Qwen3ForCausalLM", _read_qwen3),
    "opt": ("OPTForCausalLM", _read_opt),
}


def _read_sizes(fields: Fields, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    name = "dtype" if fields.value("dtype") else "torch_dtype"
    dtype = fields.text(name, "float32")
    if dtype not in _DTYPES:
        raise fields.unsupported(name, f"{dtype!r} is not supported, only {', '.join(_DTYPES)}")
    fields.value("torch_dtype")
    return {
        "num_layers": fields.integer("num_hidden_layers", high=1024),
        "hidden_size": fields.integer("hidden_size", high=2**17),
        "num_heads": fields.integer("num_attention_heads", high=4096),
        "vocab_size": fields.integer("vocab_size", high=2**22),
        "eos_ids": eos_ids,
        "dtype": _DTYPES[dtype],
    }


def _read_rope_decoder(
    fields: Fields,
    eos_ids: tuple[int, ...],
    *,
    kv_heads: int | None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """What all but OPT share.

    Args:
        kv_heads: when the field is absent; None: as many as heads.
        head_dim: when the field is absent; None: heads share the hidden size.
    """
    sizes = _read_sizes(fields, eos_ids)
    heads = sizes["num_heads"]
    if kv_heads is None or fields.has("num_key_value_heads"):
        kv_heads = heads
    kv_heads = fields.integer("num_key_value_heads", kv_heads, high=4096)
    if heads % kv_heads:
        raise fields.fail(
            "num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})"
        )
    head_dim = head_dim or _head_dim(fields, sizes["hidden_size"], heads)
    if head_dim % 2:
        raise fields.fail("head_dim", f"must be even for rotary embedding, not {head_dim}")
    positions = fields.integer("max_position_embeddings", high=2**27)
    rope = read_rope(fields, max_positions=positions)
    if rope.kind == "dynamic" and head_dim < 4:
        raise fields.fail("head_dim", f"must be at least 4 for dynamic RoPE, not {head_dim}")
    return {
        **sizes,
        "intermediate_size": fields.integer("intermediate_size", high=2**20),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": max(positions, rope.reach) if rope.kind != "llama3" else positions,
        "rope": rope,
        "activation": _activation(fields, "hidden_act", "silu"),
        "is_gated": True,
        "norm": "rms",
        "norm_eps": fields.number("rms_norm_eps", 1e-6, high=1.0),
        "embedding_size": sizes["hidden_size"],
        "is_tied": fields.flag("tie_word_embeddings", False),
    }


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if fields.value("head_dim") is None and hidden % heads:
        raise fields.fail("num_attention_heads", f"({heads}) must divide hidden_size ({hidden})")
    return fields.integer("head_dim", hidden // heads or None, high=4096)


def _activation(fields: Fields, name: str, default: str) -> Activation:
    spelled = fields.text(name, default)
    if spelled not in _ACTIVATIONS:
        raise fields.unsupported(
            name, f"{spelled!r} is not supported, only {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[spelled]


def _window(fields: Fields) -> int | None:
    if fields.value("sliding_window") is None:
        return None
    return fields.integer("sliding_window", high=2**27)


def _refuse_window(fields: Fields) -> None:
    if any(_by_layer_types(fields, 1) or ()):
        raise fields.unsupported("layer_types", "with sliding_attention is not supported for Llama")


def _qwen_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    window = _window(fields) if fields.has("sliding_window") else 4096
    if not fields.flag("use_sliding_window", False):
        window = None
    windows = _by_layer_types(fields, window)
    if windows is not None:
        return windows
    full = fields.integer("max_window_layers", 28, low=0, high=2**20)
    return tuple(window if layer >= full else None for layer in range(num_layers))


def _by_layer_types(fields: Fields, window: int | None) -> tuple[int | None, ...] | None:
    types = fields.value("layer_types")
    if types is None:
        return None
    num_layers = fields.integer("num_hidden_layers", high=1024)
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.fail("layer_types", f"must list {num_layers} layers, not {types!r}")
    for each in types:
        if each not in ("full_attention", "sliding_attention"):
            raise fields.unsupported("layer_types", f"with {each!r} is not supported")
        if each == "sliding_attention" and window is None:
            raise fields.fail("layer_types", "has sliding_attention, but no sliding window is set")
    return tuple(window if each == "sliding_attention" else None for each in types)
