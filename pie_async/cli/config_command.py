"""`pie-async config`: what an engine would be told, and what it can be."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from pie_async.cli.options import MODEL, SETTINGS, default_of, with_engine_flags
from pie_async.config import BUILTIN_MODEL, EngineConfig, format_size
from pie_async.settings import Setting


@with_engine_flags
def config(
    *,
    model: MODEL = BUILTIN_MODEL,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the configuration.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print all settings as a table for documents.")
    ] = False,
    engine: EngineConfig,
) -> int:
    """Show what flags, environment and file come to, as a file for --config."""
    del model
    if schema:
        described = msgspec.json.encode(msgspec.json.schema(EngineConfig))
        typer.echo(msgspec.json.format(described, indent=2).decode())
    elif markdown:
        typer.echo(settings_table())
    else:
        typer.echo(as_toml(engine))
    return 0


def as_toml(engine: EngineConfig) -> str:
    """The settings that are not as by default, as a file that says the same."""
    lines = [f"model = {_quoted(engine.model)}"]
    usual = EngineConfig()
    for field, told in SETTINGS.items():
        value = getattr(engine, field)
        if value != getattr(usual, field):
            lines.append(f"{told.key} = {_written(told, value)}")
    return "\n".join(lines)


def _written(told: Setting, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if told.kind in ("size", "rate") and value == int(value):
        return _quoted(_exact(int(value)))
    if told.kind == "seconds":
        return _quoted(f"{value:g}s")
    return str(value) if isinstance(value, int | float) else _quoted(value)


def _exact(num_bytes: int) -> str:
    """Shorter only where nothing is lost."""
    short = format_size(num_bytes).replace(" ", "").replace(".0", "")
    units = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    of = units.get(short[-3:], 0)
    is_exact = of and num_bytes % of == 0
    return f"{num_bytes // of}{short[-3:]}" if is_exact else str(num_bytes)


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()  # a JSON string is a TOML one


def settings_table() -> str:
    """All settings in Markdown, by their groups."""
    parts = []
    for panel in dict.fromkeys(told.panel for told in SETTINGS.values()):
        parts.append(f"### {panel}\n\n| flag | value | default | what it does |\n|---|---|---|---|")
        parts += [
            f"| `{told.flag}` | {_cell(told.written) or 'on or off'} | {_cell(default_of(field))} "
            f"| {_cell(told.help)} |"
            for field, told in SETTINGS.items()
            if told.panel == panel
        ]
        parts.append("")
    return "\n".join(parts).rstrip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
