"""docs/openai.md names every field and every error code, and says of each what is true."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from pie_async.openai import errors, outline
from pie_async.openai.requests import ChatRequest, CompletionRequest, GenerationRequest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/openai.md").read_text()


def rows(title: str) -> list[list[str]]:
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def documented(*where: str) -> set[str]:
    """The fields of these rows, what stands in brackets left out."""
    return {
        name
        for names, *rest in rows("Fields")
        if (rest[0] if rest else "").rstrip("| ") in where
        for name in re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", names))
    }


def fields(kind: type) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind)}


def refused(each: outline.Outline) -> set[str]:
    return set(each._neutral)


def test_every_field_that_is_taken_is_documented_and_no_other() -> None:
    both = documented("chat and completions", "vLLM's, in both") - {"logprobs"}
    assert both == fields(GenerationRequest)
    chat = documented("chat", "vLLM's, in chat") | {"logprobs"}
    assert chat == fields(ChatRequest) - both
    assert documented("completions") | {"logprobs"} == fields(CompletionRequest) - both


def test_every_field_that_is_refused_is_documented_and_no_other() -> None:
    both = documented("refused in both, unless they ask for nothing")
    chat = documented("refused in chat, likewise")
    completions = documented("refused in completions, likewise")
    assert both | chat == refused(outline.OUTLINE_OF_CHAT)
    assert both | completions == refused(outline.OUTLINE_OF_COMPLETIONS)


def test_every_code_is_documented_with_its_status() -> None:
    told = {
        code: int(status) for status, codes, *_ in rows("Errors")
        for code in re.findall(r"`(\w+)`", codes)
    }  # fmt: skip
    sources = "\n".join(
        path.read_text()
        for room in ("openai", "api")
        for path in (ROOT / "pie_async" / room).glob("*.py")
    )
    written = set(re.findall(r'\bcode(?:: str)? ?= ?"(\w+)"', sources))
    by_row = {row.code: row.status for row in (*errors._ROWS, errors._INTERNAL) if row.code}
    named = {"context_length_exceeded", "unknown_url", "method_not_allowed"}
    assert set(told) == written | set(by_row) | named
    assert by_row.items() <= told.items()
    assert {row.status for row in errors._ROWS} <= set(told.values())
