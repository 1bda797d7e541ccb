"""The live page: one document, with its style and script inside and nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from aiohttp import web


class Page:
    """Put together once; every server's is the same, so it needs no API key: what it shows does."""

    def __init__(self) -> None:
        files = resources.files("pie_async.api") / "assets"
        html, style, script = (
            (files / name).read_text(encoding="utf-8")
            for name in ("page.html", "page.css", "page.js")
        )
        self._body = html.replace("/* style */", style).replace("/* script */", script).encode()
        self._headers = {
            "Content-Security-Policy": _policy(style, script),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-cache",
        }

    def response(self) -> web.Response:
        return web.Response(
            body=self._body, content_type="text/html", charset="utf-8", headers=self._headers
        )


def _policy(style: str, script: str) -> str:
    """This style, this script and this server, and nothing else."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
