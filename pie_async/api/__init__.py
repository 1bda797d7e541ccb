"""SPEAKS HTTP. The only room that imports aiohttp; what it says is decided in `openai/`."""

from pie_async.api.app import create_app, pie_app
from pie_async.api.server import serve

__all__ = ["create_app", "pie_app", "serve"]
