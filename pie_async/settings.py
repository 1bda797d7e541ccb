"""How a field of a configuration is written by people: flag, environment variable, TOML key.

A field says so in its annotation; command line, documentation and schema are made from that.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec

Kind = Literal[
    "size", "count", "seconds", "rate", "share", "pool", "words", "text", "switch"
]  # fmt: skip
"""What is written: 64MiB; 32k; 50ms; 12GB/s; 80GiB or 90%; host or peer:1; one of some words; any
text; on or off."""

_WRITTEN: dict[Kind, str] = {
    "size": "SIZE",
    "count": "N",
    "seconds": "TIME",
    "rate": "SIZE/s",
    "share": "SIZE|SHARE",
    "pool": "host|peer:N",
    "text": "TEXT",
}
PREFIX = "PIE_ASYNC_"
"""Of environment variables."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One field as people see it."""

    flag: str
    """As "--device-kv"."""
    kind: Kind
    help: str
    """One line."""
    default: str = ""
    """Told instead of the value that the field has by default."""
    panel: str = "Engine"
    """The group that it is shown in."""
    metavar: str = ""
    """Told instead of what its kind says."""
    words: tuple[str, ...] = ()
    """What may be written, if it is one of some words."""

    @property
    def written(self) -> str:
        return self.metavar or "|".join(self.words) or _WRITTEN.get(self.kind, "")

    @property
    def key(self) -> str:
        """In a TOML file."""
        return self.flag.removeprefix("--")

    @property
    def variable(self) -> str:
        return variable_of(self.flag)


def variable_of(flag: str) -> str:
    """The environment variable that sets a flag."""
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def setting(
    flag: str,
    kind: Kind,
    help: str,  # noqa: A002
    *,
    default: str = "",
    panel: str = "Engine",
    metavar: str = "",
) -> msgspec.Meta:
    """What a field's annotation says of it; arguments as in `Setting`."""
    told = Setting(flag=flag, kind=kind, help=help, default=default, panel=panel, metavar=metavar)
    return msgspec.Meta(description=help, extra={"setting": told})


@functools.cache
def settings_of(struct: type[msgspec.Struct]) -> dict[str, Setting]:
    """The settings among a struct's fields, by their names, in order."""
    found = {}
    for name, hint in get_type_hints(struct, include_extras=True).items():
        for meta in getattr(hint, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.extra and "setting" in meta.extra:
                told: Setting = meta.extra["setting"]
                if told.kind == "words":
                    told = msgspec.structs.replace(told, words=_words(hint.__origin__))
                found[name] = told
    return found


def _words(hint: object) -> tuple[str, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for part in get_args(hint) for word in _words(part))
