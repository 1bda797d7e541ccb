"""WAITS. asyncio only; knows neither LLMs nor GPUs."""
