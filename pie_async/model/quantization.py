"""Which checkpoints have FP8 weights (`fp8.py`); others' are made so while loading.

A checkpoint's scale per tensor is spread over its channels. Scales of activations are not read:
where activations are quantised, every token gets a scale of its own, which is never coarser. Loads
no torch: a server's process reads this too.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pie_async.model.config_fields import Fields

Strategy = Literal["tensor", "channel"]


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """FP8 weights of the linear layers; embeddings and the output layer are as they were."""

    scales: Strategy | None
    """What one stored scale is for; None: the checkpoint is not quantised, loading does it."""
    quantizes_activations: bool = True
    ignored: tuple[str, ...] = ()
    """Layers, or what their names begin with; after "*", what they end with."""

    def includes(self, layer: str) -> bool:
        """Whether the layer of this checkpoint name has FP8 weights."""
        return not any(
            layer.endswith(each[1:])
            if each.startswith("*")
            else layer == each or layer.startswith(f"{each}.")
            for each in self.ignored
        )


WHILE_LOADING = Quantization(scales=None)


def read_quantization(config: Fields) -> Quantization | None:
    """The `quantization_config` of a config.json.

    Raises:
        UnsupportedModel: another method, other numbers than FP8, or scales of other things.
    """
    values = config.value("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise config.fail("quantization_config", f"must be an object, not {values!r}")
    fields = config.within("quantization_config", values)
    method = fields.text("quant_method")
    if method not in _READERS:
        raise config.unsupported(
            "quantization_config", f"{method!r} is not supported, only {', '.join(_READERS)}"
        )
    return _READERS[method](fields)


def _read_compressed_tensors(fields: Fields) -> Quantization:
    """https://github.com/neuralmagic/compressed-tensors, as llm-compressor writes it."""
    file_format = fields.text("format", "float-quantized")
    if file_format not in ("float-quantized", "naive-quantized"):
        raise fields.unsupported("format", f"{file_format!r} is not supported, only FP8's")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if fields.value(name):
            raise fields.unsupported(name, "is not supported")
    groups = fields.value("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise fields.unsupported("config_groups", "other than one are not supported")
    group = _object(fields, next(iter(groups)), next(iter(groups.values())))
    if group.value("targets") != ["Linear"]:
        raise group.unsupported("targets", "other than Linear are not supported")
    if group.value("output_activations"):
        raise group.unsupported("output_activations", "are not supported")
    weights = _object(group, "weights", group.value("weights"))
    strategy = _strategy(weights, ("tensor", "channel"))
    inputs = group.value("input_activations")
    if inputs is not None:
        _strategy(_object(group, "input_activations", inputs), ("tensor", "token"))
    return Quantization(
        scales="tensor" if strategy == "tensor" else "channel",
        quantizes_activations=inputs is not None,
        ignored=tuple(_plain_name(fields, "ignore", each) for each in _names(fields, "ignore")),
    )


def _read_fbgemm(fields: Fields) -> Quantization:
    """https://huggingface.co/docs/transformers/quantization/fbgemm_fp8."""
    return Quantization(scales="channel", ignored=_names(fields, "modules_to_not_convert"))


def _read_fp8(fields: Fields) -> Quantization:
    """AutoFP8's; Hugging Face has blocks of weights under the same name."""
    for name in ("weight_block_size", "kv_cache_scheme"):
        if fields.value(name) is not None:
            raise fields.unsupported(name, "is not supported")
    ignored = _names(fields, "ignored_layers") + _names(fields, "modules_to_not_convert")
    return Quantization(scales="tensor", ignored=ignored)


_READERS = {
    "compressed-tensors": _read_compressed_tensors,
    "fbgemm_fp8": _read_fbgemm,
    "fp8": _read_fp8,
}


def _strategy(scheme: Fields, known: tuple[str, ...]) -> str:
    """What a scale of symmetric FP8 numbers is for."""
    if scheme.text("type", "int") != "float" or scheme.integer("num_bits") != 8:
        raise scheme.unsupported("type", "other than 8-bit float is not supported")
    if not scheme.flag("symmetric", True):
        raise scheme.unsupported("symmetric", "false is not supported")
    strategy = scheme.text("strategy", known[0])
    if strategy not in known:
        raise scheme.unsupported(
            "strategy", f"{strategy!r} is not supported, only {', '.join(known)}"
        )
    return strategy


def _object(fields: Fields, name: str, value: Any) -> Fields:
    if not isinstance(value, dict):
        raise fields.fail(name, f"must be an object, not {value!r}")
    return fields.within(name, value)


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.value(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise fields.fail(name, f"must be a list of layers' names, not {value!r}")
    return tuple(value)


def _plain_name(fields: Fields, name: str, layer: str) -> str:
    """Of patterns only "anything that ends with": others could take a reader's time for ever."""
    if not layer.startswith("re:"):
        return layer
    ending = layer.removeprefix("re:").removeprefix("^").removeprefix(".*").removesuffix("$")
    if ".*" not in layer or not ending.replace("_", "").replace("\\.", "").isalnum():
        raise fields.unsupported(name, f"with {layer!r} is not supported")
    return "*" + ending.replace("\\.", ".")
