"""SPEAKS OpenAI: bytes of a request in, bytes of a response or of server-sent events out.

Everything of OpenAI's HTTP API but HTTP itself. `OpenAIService` is the door; aiohttp (`api/`),
an ASGI application or a Ray Serve deployment can stand in front of it.
"""
