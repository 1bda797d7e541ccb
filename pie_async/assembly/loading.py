"""From a configuration to a loaded model and its sizes, the same way for every device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pie_async.assembly.byte_tokenizer import ByteTokenizer
from pie_async.assembly.parts import Limits, Parts, Progress, Tokenizer
from pie_async.assembly.sizing import compute_dtype, count_host_slots, longest_sequence
from pie_async.config import BUILTIN_MODEL, EngineConfig
from pie_async.core.layout import KvLayout
from pie_async.device.protocol import Device
from pie_async.errors import ConfigError, ModelError
from pie_async.model_info import ModelInfo

if TYPE_CHECKING:
    import torch

    from pie_async.model.config import ModelConfig
    from pie_async.model.decoder import Decoder
    from pie_async.model.guides import MaskTable


class Files(NamedTuple):
    """What is known of a model before its weights are read."""

    path: Path | None
    """None: a named shape, which has no directory."""
    config: ModelConfig
    tokenizer: Tokenizer
    dtype_name: str


class Sizes(NamedTuple):
    """How much of everything there will be."""

    layout: KvLayout
    device_slots: int
    host_slots: int
    staging_slots: int
    max_model_len: int
    weight_bytes: int


def read_model(config: EngineConfig) -> tuple[Path | None, ModelConfig]:
    """A model's directory and what its config.json says; named shapes have no directory.

    Raises:
        ModelError: there is no such model, or it is not supported.
    """
    from pie_async.model.checkpoint import resolve_model
    from pie_async.model.config import config_of, read_config
    from pie_async.model.named_shapes import NAMED_SHAPES

    shape = None if Path(config.model).is_dir() else NAMED_SHAPES.get(config.model)
    if shape is None:
        path = resolve_model(config.model)
        return path, read_config(path)
    if config.load_format != "random":
        raise ModelError(
            f"{config.model} is the name of a shape, without weights; add --load-format random, "
            "or give a model directory"
        )
    return None, config_of(shape, config.model)


def read_files(config: EngineConfig) -> Files:
    path, model = read_model(config)
    dtype_name = compute_dtype(config, model.dtype)
    if config.quantization is not None and model.quantization is None:
        from pie_async.model.quantization import WHILE_LOADING

        model = msgspec.structs.replace(model, quantization=WHILE_LOADING)
    return Files(path, model, _read_tokenizer(config, path, model.vocab_size), dtype_name)


def _read_tokenizer(config: EngineConfig, path: Path | None, vocab_size: int) -> Tokenizer:
    is_random = config.load_format == "random"
    if path is None or (is_random and not (path / "tokenizer.json").is_file()):
        return ByteTokenizer(vocab_size)
    from pie_async.model.tokenizer import Tokenizer as ModelTokenizer

    tokenizer = ModelTokenizer.from_directory(path)
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"{path / 'tokenizer.json'} has token ids up to {tokenizer.vocab_size - 1}, its "
            f"config.json says vocab_size {vocab_size}; they belong to different models, or tokens "
            "were added without enlarging the embedding"
        )
    return tokenizer


def refuse_quantization(config: EngineConfig) -> None:
    if config.quantization is not None:
        raise ConfigError(
            f"quantization {config.quantization} needs device cuda, not {config.device}",
            option="quantization",
        )


def load(
    config: EngineConfig,
    files: Files,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> Decoder:
    """The model, its parameters filled as configured."""
    if config.load_format == "random":
        from pie_async.model.random_weights import random_model

        return random_model(files.config, dtype, device, seed=config.seed)
    from pie_async.model.weights import load_model

    assert files.path is not None
    return load_model(files.path, files.config, dtype, device, progress=progress)


def size_up(
    config: EngineConfig,
    files: Files,
    layout: KvLayout,
    device_slots: int,
    *,
    staging_slots: int | None = None,
) -> Sizes:
    """Sizes that follow from the configuration and the arena.

    Args:
        staging_slots: None: as many as the host pool has.
    """
    host_slots = count_host_slots(config, layout)
    staging_slots = host_slots if staging_slots is None else staging_slots
    return Sizes(
        layout=layout,
        device_slots=device_slots,
        host_slots=host_slots,
        staging_slots=staging_slots,
        max_model_len=longest_sequence(
            config, layout, files.config.max_positions, device_slots + staging_slots
        ),
        weight_bytes=files.config.weight_bytes(layout.item_bytes),
    )


def most_blocks(sizes: Sizes) -> int:
    """Longest block table."""
    return sizes.layout.blocks_for(sizes.max_model_len) + 1


def make_parts(
    config: EngineConfig,
    files: Files,
    sizes: Sizes,
    limits: Limits,
    device: Device,
    masks: MaskTable,
) -> Parts:
    from pie_async.model.guides import GuideCompiler, GuideRoom, ThreadedGuides

    info = ModelInfo(
        name=served_name(config.model),
        family=files.config.family,
        dtype=files.dtype_name,
        vocab_size=files.config.vocab_size,
        max_model_len=sizes.max_model_len,
        num_parameters=files.config.num_parameters,
        weight_bytes=sizes.weight_bytes,
        writes_tools_as="llama3" if files.tokenizer.has_token("<|python_tag|>") else "hermes",
        thinks=files.tokenizer.has_token("<think>"),
    )
    eos_ids = frozenset(files.config.eos_ids) | frozenset(files.tokenizer.eos_ids)
    compiler = GuideCompiler(files.tokenizer, info.vocab_size, eos_ids)
    return Parts(
        device=device,
        tokenizer=files.tokenizer,
        model=info,
        eos_ids=eos_ids,
        limits=limits,
        guides=ThreadedGuides(GuideRoom(compiler, masks)),
        compiler=compiler,
    )


def served_name(model: str) -> str:
    """What clients call a model given as a path, a hub id or "builtin"."""
    if model == BUILTIN_MODEL:
        return "pie-shakespeare"
    path = Path(model)
    return path.resolve().name if path.is_dir() else model
