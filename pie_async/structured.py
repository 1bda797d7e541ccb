"""What an output must look like: a caller's schema, pattern or grammar, as plain data."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from pie_async.errors import InvalidRequest

MAX_GRAMMAR_CHARS = 256 * 1024
MAX_CHOICES = 4096

GuideKind = Literal["json", "json_object", "regex", "choice", "grammar"]


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """Constrains every output of a request; exactly one field is given.

    Names follow vLLM's `StructuredOutputsParams`. Construction raises `InvalidRequest`, whose
    `param` is `structured_outputs` or names the field within it.
    """

    json: str | dict[str, Any] | bool | None = None
    """A JSON schema, as data or as JSON. Kept as JSON."""
    json_object: bool | None = None
    """True: any JSON object."""
    regex: str | None = None
    """A regular expression that the whole output matches (Rust's syntax: no look-around)."""
    choice: tuple[str, ...] | None = None
    """The output is one of these texts."""
    grammar: str | None = None
    """A context-free grammar: Lark's syntax as llguidance reads it, or GBNF (`root ::= ...`)."""

    def __post_init__(self) -> None:
        given = [name for name in get_args(GuideKind) if getattr(self, name) not in (None, False)]
        if self.json is False:
            given.append("json")  # a schema too: nothing fits it
        if len(given) != 1:
            what = f"{' and '.join(given)} are" if given else "nothing is"
            raise InvalidRequest(
                f"structured_outputs takes exactly one of {', '.join(get_args(GuideKind))}; "
                f"{what} given",
                param="structured_outputs",
            )
        check = getattr(self, f"_check_{given[0]}", None)
        if check is not None:
            check()

    @property
    def kind(self) -> GuideKind:
        """Which field is given."""
        kinds: tuple[GuideKind, ...] = get_args(GuideKind)
        return next(name for name in kinds if getattr(self, name) not in (None, False))

    def _check_json(self) -> None:
        if not isinstance(self.json, str):
            try:
                text = msgspec.json.encode(self.json).decode()
            except (TypeError, ValueError, RecursionError) as error:
                raise _refusal("json", f"is no JSON: {error}") from None
            msgspec.structs.force_setattr(self, "json", text)
        self._check_text("json")

    def _check_regex(self) -> None:
        self._check_text("regex")

    def _check_grammar(self) -> None:
        self._check_text("grammar")

    def _check_json_object(self) -> None:
        if self.json_object is not True:
            raise _refusal("json_object", f"is {self.json_object!r}, not true")

    def _check_text(self, name: str) -> None:
        text = getattr(self, name)
        if not isinstance(text, str) or not 0 < len(text) <= MAX_GRAMMAR_CHARS:
            length = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise _refusal(name, f"must be a text of 1 to {MAX_GRAMMAR_CHARS} characters: {length}")
        _check_unicode(name, text)

    def _check_choice(self) -> None:
        choice = self.choice
        if isinstance(choice, str) or not hasattr(choice, "__iter__"):
            raise _refusal("choice", "must be a list of texts")
        texts = tuple(choice or ())
        if not all(isinstance(each, str) and each for each in texts):
            raise _refusal("choice", "must be a list of texts that are not empty")
        if not 0 < len(texts) <= MAX_CHOICES or sum(map(len, texts)) > MAX_GRAMMAR_CHARS:
            raise _refusal(
                "choice",
                f"must hold 1 to {MAX_CHOICES} texts of {MAX_GRAMMAR_CHARS} characters in all",
            )
        for each in texts:
            _check_unicode("choice", each)
        msgspec.structs.force_setattr(self, "choice", texts)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal(name, "has half of a surrogate pair; send well-formed Unicode") from None


def _refusal(name: str, what: str) -> InvalidRequest:
    param = f"structured_outputs.{name}"
    return InvalidRequest(f"{param} {what}", param=param)
