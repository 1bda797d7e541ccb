"""Guides compiled for a vocabulary, the masks they make, and sampling under these."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading

import msgspec
import numpy as np
import pytest
import torch
from llguidance import LLExecutor

from pie_async.assembly.byte_tokenizer import ByteTokenizer
from pie_async.errors import InvalidRequest
from pie_async.ids import Lane, MaskSlot, SequenceId
from pie_async.messages import LaneBinding, MaskMade, MaskOrder
from pie_async.model.checkpoint import resolve_model
from pie_async.model.guides import (
    MOST_AGAIN_S,
    MOST_APART,
    GuideCompiler,
    GuideRoom,
    ThreadedGuides,
    mask_shape,
)
from pie_async.model.sampling import LaneSampler
from pie_async.model.tokenizer import Tokenizer
from pie_async.sampling_params import SamplingParams
from pie_async.structured import StructuredOutputs

VOCAB = 300
BUILTIN_VOCAB = 4101


@pytest.fixture(scope="module")
def compiler() -> GuideCompiler:
    return GuideCompiler(ByteTokenizer(VOCAB), VOCAB, ())


@pytest.fixture(scope="module")
def builtin() -> Tokenizer:
    return Tokenizer.from_directory(resolve_model("builtin"))


def allowed(row: np.ndarray, size: int) -> set[int]:
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")[:size]
    return set(np.flatnonzero(bits).tolist())


BAD = [
    ({"json": '{"type": "objec"}'}, "json", "objec"),
    ({"json": "[1"}, "json", ""),
    ({"json": "[1]"}, "json", "object"),
    ({"json": {"$ref": "http://example.com/schema"}}, "json", "retriev"),
    ({"json": {"$ref": "file:///etc/passwd"}}, "json", "retriev"),
    ({"json": {"$ref": "#/nowhere"}}, "json", "nowhere"),
    ({"json": {"not": {}}}, "json", "not"),
    ({"json": '{"anyOf":[' * 5000 + "{}" + "]}" * 5000}, "json", "recursion"),
    ({"json": False}, "json", ""),
    ({"regex": "("}, "regex", "unclosed"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex", ""),
    ({"regex": "(?=a)b"}, "regex", "look"),
    ({"grammar": "start: nowhere"}, "grammar", "nowhere"),
    ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar", ""),
    ({"grammar": "start: start"}, "grammar", "no output"),
    ({"grammar": "not a grammar"}, "grammar", ""),
]


@pytest.mark.parametrize(("fields", "kind", "said"), BAD)
def test_what_cannot_be_used_is_refused_by_name(compiler, fields: dict, kind: str, said: str):
    with pytest.raises(InvalidRequest) as refused:
        compiler.compile(StructuredOutputs(**fields))
    assert refused.value.param == f"structured_outputs.{kind}"
    assert said in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "structured_outputs"),
        ({"regex": "a", "grammar": "b"}, "structured_outputs"),
        ({"regex": "\ud800"}, "structured_outputs.regex"),
        ({"regex": "a" * (256 * 1024 + 1)}, "structured_outputs.regex"),
        ({"json": {"a": object()}}, "structured_outputs.json"),
        ({"choice": "ab"}, "structured_outputs.choice"),
        ({"choice": [str(n) for n in range(4097)]}, "structured_outputs.choice"),
        ({"json_object": 1}, "structured_outputs.json_object"),
    ],
)
def test_what_is_no_guide_is_refused_at_once(fields: dict, param: str):
    with pytest.raises(InvalidRequest) as refused:
        StructuredOutputs(**fields)
    assert refused.value.param == param


ACCEPTED = [
    ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
               "additionalProperties": False}}, ['{"a": 1}', '{"a":12}'], ['{"b"', "[", '{"a":"']),
    ({"json_object": True}, ["{}", '{"x": [1, null]}'], ["1", "[", '"']),
    ({"regex": "[0-9]{2}(a|b)"}, ["12a", "99b"], ["1a", "123", "x"]),
    ({"choice": ['say "hi"', "no\\"]}, ['say "hi"', "no\\"], ["say hi", "maybe"]),
    ({"grammar": 'start: "a" start | "b"'}, ["b", "aab"], ["c", "ac"]),
    ({"grammar": 'root ::= "x" root | "y"'}, ["y", "xxy"], ["z"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "right", "wrong"), ACCEPTED)
def test_masks_follow_the_guide(compiler, fields: dict, right: list[str], wrong: list[str]):
    """A text is right if each of its characters is in the mask that the ones before it make."""
    table = np.zeros(mask_shape(1, VOCAB), np.int32)
    room = GuideRoom(compiler, table)

    def passes(text: str) -> bool:
        guide: StructuredOutputs | None = StructuredOutputs(**fields)
        tokens: tuple[int, ...] = ()
        for char in text:
            made = room.make(MaskOrder(SequenceId(1), MaskSlot(1), tokens, guide))
            assert made.refusal is None
            if made.is_ended or ord(char) not in allowed(table[1], VOCAB):
                return False
            guide, tokens = None, (ord(char),)
        return True

    assert [passes(text) for text in right] == [True] * len(right)
    assert [passes(text) for text in wrong] == [False] * len(wrong)


def test_a_complete_output_is_said_to_be(compiler):
    room = GuideRoom(compiler, np.zeros(mask_shape(1, VOCAB), np.int32))
    order = MaskOrder(SequenceId(1), MaskSlot(0), tuple(b"ye"), StructuredOutputs(choice=["yes"]))
    assert not room.make(order).is_ended
    assert room.make(MaskOrder(SequenceId(1), MaskSlot(0), tuple(b"s"))).is_ended


def test_an_output_that_the_guide_does_not_allow_is_refused(compiler):
    room = GuideRoom(compiler, np.zeros(mask_shape(1, VOCAB), np.int32))
    guide = StructuredOutputs(choice=["yes"])
    made = room.make(MaskOrder(SequenceId(1), MaskSlot(0), tuple(b"no"), guide))
    assert made.refusal


def orders_of(*, started: bool) -> list[MaskOrder]:
    """Of guides that go on, are complete or refuse, told of none, one or several tokens."""
    told = [
        ((), ()),
        ((), b"y"),
        (b"y", b"e"),
        (b"ye", b"s"),
        (b"", b"no"),
        (b"yes", b""),
        (b"", b"n"),
    ]
    guide = StructuredOutputs(regex="yes|yeah")
    return [
        MaskOrder(SequenceId(n), MaskSlot(n), tuple(after), None)
        if started
        else MaskOrder(SequenceId(n), MaskSlot(n), tuple(before), guide)
        for n, (before, after) in enumerate(told)
    ]


@pytest.mark.parametrize("is_wide", [False, True], ids=["the vocabulary's width", "wider"])
def test_masks_made_together_are_those_made_one_by_one(compiler, is_wide: bool):
    found = []
    for together in (False, True):
        words = compiler.words + 3 * is_wide
        table = np.zeros((8, words), np.int32)
        room = GuideRoom(compiler, table)
        for order in orders_of(started=False):
            room.make(order)
        orders = orders_of(started=True)
        made = room.make_together(orders, LLExecutor(2)) if together else map(room.make, orders)
        told = [(mask.sequence, mask.slot, mask.is_ended, mask.refusal) for mask in made]
        going = [slot for _, slot, is_ended, refusal in told if not is_ended and refusal is None]
        found.append((told, table[going, 1:].tolist(), [allowed(table[n], 128) for n in going]))
    assert found[0] == found[1]
    told, _, masks = found[0]
    assert [is_ended for _, _, is_ended, _ in told] == [
        False,
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert [bool(refusal) for *_, refusal in told] == [False] * 4 + [True, False, True]
    assert masks == [{ord("y")}, {ord("e")}, {ord("s"), ord("a")}]


def test_of_masks_that_took_long_together_each_may_be_the_slow_one(compiler):
    room = GuideRoom(compiler, np.zeros((8, compiler.words), np.int32))
    for order in orders_of(started=False):
        room.make(order)
    clock = iter([1.0, 1.004, 2.0, 2.5]).__next__
    first, second = orders_of(started=True)[:2]
    orders = [first, msgspec.structs.replace(second, tokens=())]
    quick, slow = (
        [mask.made_s for mask in room.make_together(orders, LLExecutor(1), clock)] for _ in range(2)
    )
    assert quick == pytest.approx([0.002, 0.002])
    assert slow == pytest.approx([0.5, 0.5])


@pytest.mark.realtime
async def test_masks_asked_for_together_do_not_wait_behind_slow_ones(compiler, monkeypatch):
    may_end = threading.Event()
    room = GuideRoom(compiler, np.zeros((16, compiler.words), np.int32))
    guides = ThreadedGuides(room)
    for order in orders_of(started=False):
        await guides.make([order])

    def slow(order: MaskOrder) -> MaskMade:
        may_end.wait(10)
        return MaskMade(order.sequence, order.slot, 10.0)

    monkeypatch.setattr(room, "make", slow)
    one, *others = orders_of(started=True)
    alone = [asyncio.create_task(guides.make([one])) for _ in range(32)]
    await asyncio.sleep(0)
    assert len(await asyncio.wait_for(guides.make(others), 5)) == len(others)
    assert not any(task.done() for task in alone)
    may_end.set()
    await asyncio.gather(*alone)
    guides.close()


def test_without_a_token_for_the_end_none_is_ever_allowed(compiler):
    table = np.zeros(mask_shape(1, VOCAB), np.int32)
    guide = StructuredOutputs(regex="a*")
    GuideRoom(compiler, table).make(MaskOrder(SequenceId(1), MaskSlot(0), (), guide))
    assert allowed(table[0], VOCAB) == {ord("a")}


def test_a_models_own_vocabulary_and_end(builtin: Tokenizer):
    """Logits may be wider than the vocabulary; what lies beyond it is never allowed."""
    compiler = GuideCompiler(builtin, BUILTIN_VOCAB, builtin.eos_ids)
    table = np.zeros(mask_shape(1, BUILTIN_VOCAB), np.int32)
    room = GuideRoom(compiler, table)
    guide = StructuredOutputs(regex="(thou)*")
    room.make(MaskOrder(SequenceId(1), MaskSlot(0), (), guide))
    texts = {builtin.token_text(token) for token in allowed(table[0], BUILTIN_VOCAB)}
    ends = {builtin.token_text(token) for token in builtin.eos_ids}
    assert {"t", "thou"} & texts
    assert ends <= texts
    assert all("thou".startswith(text[:4]) for text in texts - ends)


@pytest.mark.parametrize(
    ("compile_s", "most"), [(0.0, min(MOST_APART, os.cpu_count() or 1)), (2 * MOST_AGAIN_S, 1)]
)
def test_a_guide_is_compiled_a_few_times_if_that_is_soon_done(monkeypatch, compile_s, most):
    clock = itertools.count(0.0, compile_s)
    monkeypatch.setattr("pie_async.model.guides.time.thread_time", lambda: next(clock))
    compiler = GuideCompiler(ByteTokenizer(VOCAB), VOCAB, ())
    compiled = []
    compile_one = compiler._compiled
    monkeypatch.setattr(
        compiler, "_compiled", lambda *given: compiled.append(given) or compile_one(*given)
    )
    guide = StructuredOutputs(regex="abc{3}")
    for _ in range(3):
        compiler.check(guide)
    assert len(compiled) == 1
    for _ in range(2 * MOST_APART):
        matcher = compiler.compile(guide)
        assert matcher.consume_token(ord("a")), "a copy of its own, at the beginning"
    assert len(compiled) == most


def test_white_space_between_tokens_of_json_has_an_end(compiler):
    table = np.zeros(mask_shape(1, VOCAB), np.int32)
    room = GuideRoom(compiler, table)
    guide: StructuredOutputs | None = StructuredOutputs(json_object=True)
    tokens: tuple[int, ...] = (ord("{"),)
    for _ in range(30):
        room.make(MaskOrder(SequenceId(1), MaskSlot(0), tokens, guide))
        guide, tokens = None, (ord(" "),)
        if ord(" ") not in allowed(table[0], VOCAB):
            return
    pytest.fail("spaces without end")


def binding(lane: int, *, guided: bool, **params) -> LaneBinding:
    guide = StructuredOutputs(regex="a") if guided else None
    return LaneBinding(
        lane=Lane(lane), sequence=SequenceId(lane), seed=lane, stop_ids=(), prompt_len=1,
        sampling=SamplingParams(structured_outputs=guide, **params),
    )  # fmt: skip


@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_p": 0.9, "top_k": 5}, {"min_p": 0.1}])
def test_rows_are_sampled_under_their_masks_and_the_others_as_ever(params: dict):
    vocab, lanes = 70, torch.tensor([0, 1, 2])
    table = torch.zeros(mask_shape(3, vocab), dtype=torch.int32)
    table.numpy()[4] = np.packbits(
        np.isin(np.arange(96), [3, 33, 69]), bitorder="little"
    ).view(np.int32)  # fmt: skip
    table.numpy()[2, 1] = np.uint32(1 << 31).astype(np.int32)  # token 63: a word's sign
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(5))

    def sample(*guided: bool) -> list[int]:
        sampler = LaneSampler(lanes=3, vocab_size=vocab, device=torch.device("cpu"))
        sampler.use_masks(table)
        for lane, is_guided in enumerate(guided):
            sampler.bind(binding(lane, guided=is_guided, **params))
        slots = {Lane(0): MaskSlot(4), Lane(2): MaskSlot(2)}
        sampler.set_masks({lane: slot for lane, slot in slots.items() if guided[lane]})
        return sampler.sample(logits.clone(), lanes, torch.tensor([1, 1, 1])).tokens.tolist()

    free, masked = sample(False, False, False), sample(True, False, True)
    assert masked[0] in {3, 33, 69}
    assert masked[1] == free[1]
    assert masked[2] == 63


def test_logprobs_are_those_of_the_raw_distribution():
    table = torch.zeros(mask_shape(1, 32), dtype=torch.int32)
    table[0, 0] = 1 << 5
    sampler = LaneSampler(lanes=1, vocab_size=32, device=torch.device("cpu"))
    sampler.use_masks(table)
    sampler.bind(binding(0, guided=True, logprobs=1))
    sampler.set_masks({Lane(0): MaskSlot(0)})
    logits = torch.zeros(1, 32)
    logits[0, 9] = 2.0
    chosen = sampler.sample(logits.clone(), torch.tensor([0]), torch.tensor([1]))
    assert chosen.tokens.tolist() == [5]
    assert chosen.logprobs is not None
    assert chosen.logprobs.top_ids.tolist() == [[9]]
    assert torch.allclose(chosen.logprobs.logprobs, logits.log_softmax(-1)[:, 5])


def test_a_guide_is_plain_data():
    guide = StructuredOutputs(json={"type": "object"})
    assert json.loads(str(guide.json)) == {"type": "object"}
    assert guide.kind == "json"
