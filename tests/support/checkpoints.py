"""Small random checkpoints, written by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
OPT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **parameters}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("Llama", _rope(rope_type="linear", factor=2.5)),
    "llama-llama3": ("Llama", _rope(**_LLAMA3)),
    "llama-yarn": ("Llama", _rope(**_YARN)),
    "llama-yarn-mscale": (
        "Llama",
        _rope(**_YARN, mscale=0.7, mscale_all_dim=1.3, truncate=False, beta_fast=16),
    ),
    "llama-dynamic": (
        "Llama",
        {**_rope(rope_type="dynamic", factor=3.0), "max_position_embeddings": 20},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases-tied": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "opt": ("OPT", {}),
    "opt-post-norm-projected": ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-no-bias": ("OPT", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt-untied-gelu": ("OPT", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "opt-no-final-norm": ("OPT", {"_remove_final_layer_norm": True}),
}


@dataclasses.dataclass
class Checkpoint:
    """A directory and the model that was saved in it."""

    path: Path
    model: Any


def write_checkpoint(
    path: Path,
    variant: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Checkpoint:
    """Write a random model of this variant; weights large enough that logits differ clearly."""
    family, extra = VARIANTS[variant]
    values = {**(OPT if family == "OPT" else LLAMA), **extra, **changes}
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * spread + offset)
    model.to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return Checkpoint(path, model)


def greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy tokens for one prompt, and the logits [num_tokens, vocab] behind them.

    With its cache, as it generates itself.
    """
    tokens, rows = [], []
    # dynamic RoPE keeps growing frequencies in the model; a fresh prompt resets them.
    if hasattr(getattr(model.model, "rotary_emb", None), "original_inv_freq"):
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq.clone()
        rotary.max_seq_len_cached = rotary.original_max_seq_len
    ids, cache = torch.tensor([prompt], device=model.device), None
    with torch.no_grad():
        for _ in range(num_tokens):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, row = out.past_key_values, out.logits[0, -1].float()
            rows.append(row)
            tokens.append(int(row.argmax()))
            ids = torch.tensor([[tokens[-1]]], device=model.device)
    return tokens, torch.stack(rows)
