"""LLM inference that pools CPU memory with the device's for KV, without slowing compute.

`Engine` is the asyncio interface, `LLM` its synchronous convenience. Importing this package
loads neither torch nor aiohttp; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pie_async.config import EngineConfig
    from pie_async.engine import Engine
    from pie_async.errors import PieError
    from pie_async.llm import LLM
    from pie_async.outputs import CompletionOutput, RequestOutput
    from pie_async.sampling_params import SamplingParams
    from pie_async.structured import StructuredOutputs

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "PieError": "errors",
    "StructuredOutputs": "structured",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "PieError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
