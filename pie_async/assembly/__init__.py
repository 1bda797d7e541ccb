"""Builds what an engine is made of from its configuration: model, tokenizer, device."""

from __future__ import annotations

from pie_async.assembly.parts import ChatMessage, Limits, Parts, Progress, Tokenizer
from pie_async.config import EngineConfig

__all__ = ["ChatMessage", "Limits", "Parts", "Progress", "Tokenizer", "assemble"]


def assemble(config: EngineConfig, *, progress: Progress | None = None) -> Parts:
    """Load the model and set the device's memory aside. Blocks for as long as that takes.

    Raises:
        ConfigError: memory sizes that cannot work, naming the option.
        ModelError: the model is missing, damaged or not supported.
    """
    # What a device needs is imported with it; torch alone takes a second.
    if config.device == "sim":
        from pie_async.assembly.on_sim import assemble_sim

        return assemble_sim(config)
    if config.device == "cuda":
        from pie_async.assembly.on_cuda import assemble_cuda

        return assemble_cuda(config, progress)
    from pie_async.assembly.on_cpu import assemble_cpu

    return assemble_cpu(config, progress)
