"""An aiohttp application of its own, with OpenAI's API mounted in it.

    python examples/mounted/mounted_app.py --port 8080
    curl localhost:8080/            # the application
    curl localhost:8080/llm/v1/models   # and what is mounted in it

The engine is the application's: it starts and ends with it, and other handlers may use it too.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

from aiohttp import web

from pie_async import Engine
from pie_async.api import pie_app


def create_app(engine: Engine) -> web.Application:
    """The application around an engine that it starts and closes."""

    async def run_engine(_: web.Application) -> AsyncIterator[None]:
        async with engine:
            yield

    async def index(_: web.Request) -> web.Response:
        stats = engine.stats()
        return web.json_response({"model": engine.model.name, "running": stats.running})

    app = web.Application()
    app.cleanup_ctx.append(run_engine)
    app.router.add_get("/", index)
    app.add_subapp("/llm", pie_app(engine))
    return app


def main() -> None:
    """Serve the built-in model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "sim"])
    chosen = parser.parse_args()
    # Without handler_cancellation a client that leaves is noticed only when it would be answered.
    app = create_app(Engine(device=chosen.device))
    web.run_app(app, host="127.0.0.1", port=chosen.port, handler_cancellation=True)


if __name__ == "__main__":
    main()
