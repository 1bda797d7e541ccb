from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest
from small_tokenizers import byte_level, metaspace, sentencepiece

from pie_async.model.detokenizer import Detokenizer, WindowDetokenizer
from pie_async.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

KINDS: dict[str, Callable[[], Backend]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
}
TEXTS = [
    "Hello world, the king said: naïve café 12 €.",
    "😀😀 family 👨‍👩‍👧 flag 🇫🇷 日本語 end",
    "  leading and  double   spaces ",
    "line\n\n  indented\tx",
    "",
    " ",
]


def detokenizers(
    backend: Backend, prompt: Sequence[int], *, skip_special_tokens: bool = True
) -> list[Detokenizer]:
    """The one that the tokenizer picks, and the general one."""
    return [
        Tokenizer(backend).detokenizer(prompt, skip_special_tokens=skip_special_tokens),
        WindowDetokenizer(backend, prompt, skip_special_tokens=skip_special_tokens),
    ]


def joined(detokenizer: Detokenizer, output: Sequence[int]) -> str:
    return "".join(map(detokenizer.push, output)) + detokenizer.flush()


def text_before(backend: Backend, prompt: list[int]) -> str:
    """The prompt's text, less a character that it leaves incomplete.

    Byte-fallback decoders replace a whole run of bytes if the run's end is incomplete.
    """
    complete = next(
        backend.decode(prompt[:end])
        for end in range(len(prompt), -1, -1)
        if not backend.decode(prompt[:end]).endswith("\ufffd")
    )
    stripped = backend.decode(prompt).rstrip("\ufffd")
    return stripped if stripped.startswith(complete) else complete


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_what_the_output_adds_to_the_prompt(kind: str, text: str) -> None:
    backend = KINDS[kind]()
    tokens = backend.encode("Hello" + text).ids
    whole = backend.decode(tokens)
    for cut in range(len(tokens) + 1):
        before = text_before(backend, tokens[:cut])
        assert whole.startswith(before)
        for detokenizer in detokenizers(backend, tokens[:cut]):
            assert joined(detokenizer, tokens[cut:]) == whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_is_given_out_whole_and_at_once(kind: str) -> None:
    backend = KINDS[kind]()
    tokens = backend.encode("x😀y", add_special_tokens=False).ids
    face = [index for index in range(len(tokens)) if "😀" in backend.decode(tokens[: index + 1])]
    for detokenizer in detokenizers(backend, [backend.token_to_id("<s>")]):
        pieces = [detokenizer.push(token) for token in tokens]
        assert pieces[face[0]] == "😀"
        assert pieces[face[0] - 1] == ""
        assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_an_incomplete_character_at_the_end_becomes_a_replacement(kind: str) -> None:
    backend = KINDS[kind]()
    tokens = backend.encode("x日", add_special_tokens=False).ids[:-1]
    for detokenizer in detokenizers(backend, backend.encode("so").ids):
        assert "".join(map(detokenizer.push, tokens)).strip() == "x"
        assert set(detokenizer.flush()) == {"\ufffd"}
        assert detokenizer.flush() == ""


@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_decode_as_a_whole_byte_level_decode_does(seed: int) -> None:
    backend = byte_level()
    rng = random.Random(seed)
    start = backend.encode("so").ids
    output = [rng.randrange(256) for _ in range(200)]
    output += backend.encode("😀 done", add_special_tokens=False).ids
    expected = backend.decode([*start, *output])[2:]
    chosen, window = detokenizers(backend, start)
    assert joined(chosen, output) == expected
    # The window may give up on a character that follows long rubbish, never on sound text.
    assert joined(window, output).endswith("😀 done")


def test_broken_byte_fallback_tokens_do_not_spoil_what_is_out_already() -> None:
    backend = sentencepiece()
    euro = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    broken = [*euro, euro[0], backend.token_to_id("k")]
    for detokenizer in detokenizers(backend, backend.encode("so").ids):
        assert joined(detokenizer, broken) == "€\ufffdk"


@pytest.mark.parametrize("kind", KINDS)
def test_long_rubbish_is_not_held_back_for_ever(kind: str) -> None:
    backend = KINDS[kind]()
    continuation = backend.encode("日", add_special_tokens=False).ids[-1]
    for detokenizer in detokenizers(backend, backend.encode("so").ids):
        given = "".join(detokenizer.push(continuation) for _ in range(60))
        assert len(given) >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_skipped_or_shown(kind: str) -> None:
    backend = KINDS[kind]()
    start, end = backend.encode("the").ids, backend.token_to_id("<|end|>")
    king = backend.encode("the king", add_special_tokens=False).ids
    for skip, shown in ((True, ""), (False, "<|end|>")):
        for detokenizer in detokenizers(backend, start, skip_special_tokens=skip):
            text = joined(detokenizer, [end, *king[-1:], end])
            expected = backend.decode([*start, end, *king[-1:], end], skip_special_tokens=skip)
            assert text == expected[len(backend.decode(start, skip_special_tokens=skip)) :]
            assert text.endswith(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_ends_in_control_tokens_keeps_the_space_after_it(kind: str) -> None:
    backend = KINDS[kind]()
    prompt = backend.encode("so" + "<|start|>" * 20).ids
    output = backend.encode("x king", add_special_tokens=False).ids[-3:]
    expected = backend.decode([*prompt, *output])[len(backend.decode(prompt)) :]
    for detokenizer in detokenizers(backend, prompt):
        assert joined(detokenizer, output) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_have_no_text(kind: str) -> None:
    backend = KINDS[kind]()
    for detokenizer in detokenizers(backend, []):
        assert joined(detokenizer, [backend.get_vocab_size() + 100]) == ""
