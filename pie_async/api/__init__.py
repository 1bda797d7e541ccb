"""SPEAKS HTTP. The only room that imports aiohttp; what it says is decided in `openai/`.

Importing it loads nothing; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pie_async.api.app import create_app, pie_app
    from pie_async.api.server import serve

_HOMES = {"create_app": "app", "pie_app": "app", "serve": "server"}

__all__ = ["create_app", "pie_app", "serve"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
