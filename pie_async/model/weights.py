"""Filling a decoder's parameters from safetensors, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from pie_async.errors import ModelError, WeightsError
from pie_async.model.config import ModelConfig
from pie_async.model.config_fields import read_json_object
from pie_async.model.decoder import Decoder
from pie_async.model.safetensors_file import StoredTensor, TensorReader, read_header

Progress = Callable[[int, int], None]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMED_AT_MOST = 5


def load_model(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    progress: Progress | None = None,
) -> Decoder:
    """The model in a Hugging Face directory, ready to run.

    Nothing is allocated before all names and shapes were checked. Peak memory is the model
    in `dtype`, and beside it first a few MiB to read into, then one layer's largest weight.

    Args:
        progress: called with (bytes read, bytes to read).

    Raises:
        WeightsError: tensors are missing, left over or misshapen, or a file is damaged;
            pickled weights are refused.
    """
    stored = _find_tensors(path)
    expected = Decoder(config, dtype, torch.device("meta")).parameters.by_name
    sources = _match(path, stored, expected, config)
    decoder = Decoder(config, dtype, device)
    total = sum(source.num_bytes for source in sources.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    _fill(decoder, sources, advance)
    decoder.finish()
    return decoder


def _fill(
    decoder: Decoder, sources: dict[str, StoredTensor], advance: Callable[[int], None]
) -> None:
    reader = TensorReader()
    for name, source in sources.items():

        def write(target: Tensor, source: StoredTensor = source) -> None:
            reader.copy(source, target, advance)

        decoder.parameters.fill(name, write)


def _find_tensors(path: Path) -> dict[str, StoredTensor]:
    if (path / _INDEX).is_file():
        return _sharded(path)
    if (path / _SINGLE).is_file():
        return read_header(path / _SINGLE)
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise WeightsError(
            f"{path} has its weights as pickle ({pickles[0]}), which can run any code when "
            "loaded; convert them to safetensors (transformers: save_pretrained)"
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    found = f"; there is {shards[0]}" if shards else ""
    raise WeightsError(f"{path} has neither {_SINGLE} nor {_INDEX}{found}")


def _sharded(path: Path) -> dict[str, StoredTensor]:
    index = path / _INDEX
    try:
        places: Any = read_json_object(index).get("weight_map")
    except ModelError as error:
        raise WeightsError(str(error)) from error
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index} is damaged: it has no weight_map")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in dict.fromkeys(places.values()):
        # A checkpoint may come from anyone: it must not name files outside its directory.
        if not isinstance(file, str) or PurePath(file).name != file or file in ("", "..", "."):
            raise WeightsError(f"{index} names {file!r}, which is not a file beside it")
        headers[file] = read_header(path / file)
    absent = [name for name, file in places.items() if name not in headers[file]]
    if absent:
        raise WeightsError(f"{path}: missing {_listed(absent)}, which {_INDEX} promises")
    tensors = {name: headers[file][name] for name, file in places.items()}
    for header in headers.values():
        for name, tensor in header.items():
            tensors.setdefault(name, tensor)
    return tensors


def _match(
    path: Path,
    stored: dict[str, StoredTensor],
    expected: dict[str, Tensor],
    config: ModelConfig,
) -> dict[str, StoredTensor]:
    """The stored tensor for each expected one; names everything that does not fit."""
    # Checkpoints of the bare model (early OPT ones) lack the prefix of its place in the whole.
    found = {
        name if name in expected or f"model.{name}" not in expected else f"model.{name}": tensor
        for name, tensor in stored.items()
    }
    if config.is_tied and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        embedding = next(iter(expected))
        found.setdefault(embedding, head)
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {_listed(missing)}")
    extra = [name for name in found if name not in expected and not _is_harmless(name)]
    if extra:
        problems.append(f"not part of this model: {_listed(extra)}")
    misshapen = [
        f"{name} is {list(found[name].shape)}, should be {list(target.shape)}"
        for name, target in expected.items()
        if name in found and not _has_shape(found[name], name, target)
    ]
    if misshapen:
        problems.append(_listed(misshapen))
    if problems:
        raise WeightsError(f"{path}: {'; '.join(problems)}")
    return {name: found[name] for name in expected}


def _has_shape(stored: StoredTensor, name: str, target: Tensor) -> bool:
    """Scales are stored with and without dimensions of one."""
    if name.endswith(".weight_scale"):
        return math.prod(stored.shape) == target.numel() and len(stored.shape) <= 2
    return stored.shape == tuple(target.shape)


def _is_harmless(name: str) -> bool:
    """Derived tensors that older checkpoints stored, and scales of activations (not used)."""
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias", ".input_scale"))


def _listed(names: Sequence[str] | Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
