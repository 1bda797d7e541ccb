"""What --help shows of a command: its flags in groups. Without rich, whose import takes longer than
all the rest."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

_BEFORE_UNIT = re.compile(r"(?<=\d) (?=[KMGT]iB\b)")
_KEPT = "\N{NO-BREAK SPACE}"


class GroupedHelp(TyperCommand):
    """A command whose flags are listed by their panel."""

    # What is passed is typer's own or click's, by version.

    def get_help(self, ctx: Any) -> str:
        """The whole text."""
        return super().get_help(ctx).replace(_KEPT, " ")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The part with arguments and flags; a number and its unit stay on one line."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is None:
                continue
            kind = "Arguments" if param.param_type_name == "argument" else "Options"
            panel = getattr(param, "rich_help_panel", None) or kind
            names, text = record
            groups.setdefault(panel, []).append((names, _BEFORE_UNIT.sub(_KEPT, text)))
        for panel, records in groups.items():
            with formatter.section(panel):
                formatter.write_dl(records)
