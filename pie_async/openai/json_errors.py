"""msgspec's complaints about JSON as errors that name the client's field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pie_async.errors import InvalidRequest

_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")


def wrong_type(text: str, *, within: str = "") -> InvalidRequest:
    """The error for a `msgspec.ValidationError`.

    Args:
        text: what it said.
        within: the field that was decoded by itself.
    """
    match = _AT_PATH.match(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    path = (
        within + path if not path or path.startswith("[") else ".".join((within, path)).strip(".")
    )
    if missing := _MISSING.fullmatch(what):
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"{param} is required", param=param)
    if not path:
        return InvalidRequest(f"the body must be a JSON object: {what}")
    return InvalidRequest(f"{path}: {what}", param=path)


@contextmanager
def respelled(spelling: Mapping[str | None, str]) -> Iterator[None]:
    """Within it, an `InvalidRequest` names the client's field instead of ours."""
    try:
        yield
    except InvalidRequest as error:
        named = spelling.get(error.param)
        if named is not None and named != error.param:
            if error.param is not None and (text := str(error)).startswith(f"{error.param} "):
                error.args = (named + text.removeprefix(error.param),)
            error.param = named
        raise
