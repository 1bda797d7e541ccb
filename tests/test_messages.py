"""Messages are plain frozen data: what one process writes, another one reads."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_async import messages
from pie_async.messages import (
    Advance,
    AnyMessage,
    BlockMove,
    CopyRun,
    FirstToken,
    IterationObserved,
    LaneBinding,
    LimitCause,
    MaskMade,
    MaskOrder,
    Message,
    PromptLogprobs,
    Row,
    SampledToken,
    TableUpdate,
    decode,
    encode,
)
from pie_async.sampling_params import SamplingParams
from pie_async.structured import StructuredOutputs

INTS = st.integers(0, 2**62)
SECONDS = st.floats(0, 1e6)
TOKENS = st.lists(st.integers(0, 200_000), max_size=4).map(tuple)
REASONS = st.sampled_from(["stop", "length", "abort"])

GUIDES = st.builds(StructuredOutputs, regex=st.text("ab", min_size=1, max_size=3)) | st.builds(
    StructuredOutputs, json=st.dictionaries(st.text("ab", max_size=2), INTS, max_size=2)
)
SAMPLING = st.builds(
    SamplingParams,
    structured_outputs=st.none() | GUIDES,
    n=st.integers(1, 4),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.1, 1),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.floats(-9, 9), max_size=2),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=2).map(tuple),
    stop_token_ids=TOKENS,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    max_tokens=st.none() | st.integers(1, 9),
    output_kind=st.sampled_from(["cumulative", "delta", "final"]),
)
PAIRS = st.lists(st.tuples(st.integers(0, 99), st.floats(-50, 0)), max_size=2).map(tuple)
PARTS = {
    Row: st.builds(Row, INTS, INTS, INTS, TOKENS, st.booleans(), st.none() | INTS),
    MaskOrder: st.builds(MaskOrder, INTS, INTS, TOKENS, st.none() | GUIDES),
    MaskMade: st.builds(
        MaskMade, INTS, INTS, SECONDS, st.booleans(), st.none() | st.text(max_size=9)
    ),
    TableUpdate: st.builds(TableUpdate, INTS, INTS, TOKENS),
    CopyRun: st.builds(CopyRun, INTS, INTS, INTS),
    FirstToken: st.builds(FirstToken, INTS, SECONDS, SECONDS),
    BlockMove: st.builds(BlockMove, INTS, INTS, INTS),
    SampledToken: st.builds(SampledToken, INTS, INTS, st.floats(-50, 0), INTS, PAIRS),
}
PARTS[PromptLogprobs] = st.builds(
    PromptLogprobs, INTS, INTS, st.lists(PARTS[SampledToken], max_size=2).map(tuple)
)
PARTS[Advance] = st.builds(
    Advance,
    INTS,
    st.none() | PARTS[SampledToken],
    st.none() | REASONS,
    st.none() | INTS,
    st.none() | PARTS[FirstToken],
    st.none() | st.text(max_size=9),
    st.none() | st.text(max_size=9),
)
PARTS[LaneBinding] = st.builds(
    LaneBinding,
    lane=INTS,
    sequence=INTS,
    sampling=SAMPLING,
    seed=INTS,
    stop_ids=TOKENS,
    prompt_len=INTS,
    history=TOKENS,
)
BY_NAME = {
    "sampling": SAMPLING,
    "reason": st.text(max_size=9),
    "cause": st.sampled_from(get_args(LimitCause)),
    "rows": PARTS[Row],
    "bindings": PARTS[LaneBinding],
    "tables": PARTS[TableUpdate],
    "runs": PARTS[CopyRun],
    "moves": PARTS[BlockMove],
    "sampled": PARTS[SampledToken],
    "orders": PARTS[MaskOrder],
    "masks": PARTS[MaskMade],
    "prompt_logprobs": PARTS[PromptLogprobs],
    "advances": PARTS[Advance],
    "is_staged": st.booleans(),
    "awaits_masks": st.booleans(),
    "is_all": st.booleans(),
    "is_read": st.booleans(),
    "longest": st.none() | INTS,
    "cache_salt": st.none() | st.text(max_size=8),
}
MANY = {"rows", "bindings", "tables", "runs", "moves", "sampled", "prompt_logprobs", "advances"}
MANY |= {"orders", "masks"}
TUPLES_OF_INTS = {
    "sequences", "prompt_tokens", "output_tokens", "blocks", "failed", "unstaged",
}  # fmt: skip


def field_values(kind: type, name: str) -> st.SearchStrategy:
    """What a field may hold, told by its name as the style asks."""
    if (kind.__name__, name) == ("Cancel", "reason"):
        return REASONS
    if name in TUPLES_OF_INTS:
        return TOKENS
    values = BY_NAME.get(name, SECONDS if name.endswith("_s") else INTS)
    return st.lists(values, max_size=3).map(tuple) if name in MANY else values


def any_of(kind: type) -> st.SearchStrategy:
    fields = msgspec.structs.fields(kind)
    return st.builds(kind, **{field.name: field_values(kind, field.name) for field in fields})


KINDS = get_args(AnyMessage)


def test_every_message_is_in_the_union():
    defined = {
        thing
        for thing in vars(messages).values()
        if isinstance(thing, type) and issubclass(thing, Message) and thing is not Message
    }
    assert defined == set(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_it_survives_a_round_trip(kind: type):
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(message=any_of(kind))
    def survives(message) -> None:
        again = decode(encode(message))
        assert type(again) is kind
        assert again == message

    survives()


@pytest.mark.parametrize("kind", [*KINDS, *PARTS], ids=lambda kind: kind.__name__)
def test_it_is_frozen_and_given_no_position_unless_it_is_a_small_part(kind: type):
    config = kind.__struct_config__
    assert config.frozen
    if kind in KINDS:
        fields = msgspec.structs.fields(kind)
        if fields:
            with pytest.raises(TypeError):
                kind(*range(len(fields)))


def test_messages_are_told_apart_by_name():
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert tags == [kind.__name__ for kind in KINDS]


@pytest.mark.parametrize(
    "frame", [b"", b"\x93\x01\x02\x03", msgspec.msgpack.encode({"type": "NoSuchMessage"})]
)
def test_what_is_no_message_is_refused(frame: bytes):
    with pytest.raises(msgspec.DecodeError):
        decode(frame)


def test_a_wrong_field_is_refused():
    broken = msgspec.to_builtins(
        IterationObserved(
            iteration=1,
            compute_s=0.0,
            stall_s=0.0,
            staged_bytes=0,
            staging_busy_s=0.0,
            decode_rows=0,
            prefill_tokens=0,
            resident_blocks=0,
            streamed_blocks=0,
            wanted_blocks=0,
        )
    )
    broken["compute_s"] = "soon"
    with pytest.raises(msgspec.ValidationError, match="compute_s"):
        decode(msgspec.msgpack.encode(broken))


def test_a_row_without_tokens_feeds_one():
    assert Row(1, 0, 5, (), True).num_tokens == 1
    assert Row(1, 0, 5, (7, 8), True).num_tokens == 2
