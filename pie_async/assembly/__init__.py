"""Builds what an engine is made of from its configuration: model, tokenizer, device."""

from __future__ import annotations

import msgspec

from pie_async.assembly.parts import ChatMessage, Limits, Parts, Progress, Tokenizer
from pie_async.config import EngineConfig
from pie_async.device.faulty import FaultyDevice
from pie_async.errors import ConfigError
from pie_async.runtime.faults import ArenaRefused, CopyCorrupted, CopyFailed, Faults, PoolRefused

__all__ = ["ChatMessage", "Limits", "Parts", "Progress", "Tokenizer", "assemble"]


def assemble(
    config: EngineConfig, *, progress: Progress | None = None, faults: Faults | None = None
) -> Parts:
    """Load the model and set the device's memory aside. Blocks for as long as that takes.

    Args:
        faults: that the device is to have.

    Raises:
        ConfigError: memory sizes that cannot work, naming the option.
        ModelError: the model is missing, damaged or not supported.
    """
    if faults is None:
        return _assemble(config, progress)
    _refuse(config, faults)
    return with_faults(_assemble(config, progress), faults)


def with_faults(parts: Parts, faults: Faults) -> Parts:
    """The same parts, whose device fails as planned."""
    return msgspec.structs.replace(parts, device=FaultyDevice(parts.device, faults))


def _refuse(config: EngineConfig, faults: Faults) -> None:
    if config.exchange:
        why = "with exchange what was staged is written back, right or wrong"
        faults.plan.refuse(CopyFailed, CopyCorrupted, why=why)
    for kind, what, option in (
        (ArenaRefused, "the device has no memory for its arena", "device_kv_bytes"),
        (PoolRefused, "the host has no memory for the pool", "host_pool_bytes"),
    ):
        if faults.at(kind):
            raise ConfigError(f"{what} (by a plan of faults); lower {option}", option=option)


def _assemble(config: EngineConfig, progress: Progress | None) -> Parts:
    # What a device needs is imported with it; torch alone takes a second.
    if config.device == "sim":
        from pie_async.assembly.on_sim import assemble_sim

        return assemble_sim(config)
    if config.device == "cuda":
        from pie_async.assembly.on_cuda import assemble_cuda

        return assemble_cuda(config, progress)
    from pie_async.assembly.on_cpu import assemble_cpu

    return assemble_cpu(config, progress)
