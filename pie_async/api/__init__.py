"""SPEAKS. HTTP in OpenAI's dialect; the only room that imports aiohttp."""
