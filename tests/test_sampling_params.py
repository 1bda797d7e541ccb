"""What may be asked of sampling: refused at the door, by the field's name."""

from __future__ import annotations

import math

import pytest

from pie_async.errors import InvalidRequest
from pie_async.sampling_params import (
    MAX_LOGIT_BIASES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {5: math.nan}),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than the default max_tokens
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_refused_and_names_its_field(field: str, value):
    with pytest.raises(InvalidRequest, match=field.split("_")[0]) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 128),
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("top_k", -1),
        ("top_p", 1.0),
        ("min_p", 1.0),
        ("presence_penalty", -2.0),
        ("logit_bias", {5: -100.0}),
        ("seed", -(2**63)),
        ("max_tokens", None),
        ("min_tokens", 16),
        ("stop", ("x" * 1024,)),
        ("stop", tuple("abcdefghijklmnop")),
        ("stop_token_ids", tuple(range(MAX_STOP_TOKEN_IDS))),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES), 1.0)),
        ("logprobs", 0),
        ("prompt_logprobs", 20),
    ],
)
def test_the_edges_of_the_ranges_are_allowed(field: str, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "most", "filled"),
    [
        ("stop", MAX_STOP_STRINGS, lambda count: ["x"] * count),
        ("stop_token_ids", MAX_STOP_TOKEN_IDS, lambda count: [0] * count),
        ("stop_token_ids", MAX_STOP_TOKEN_IDS, lambda count: ["not an id"] * count),
        ("logit_bias", MAX_LOGIT_BIASES, lambda count: dict.fromkeys(range(count), 0.0)),
    ],
)
@pytest.mark.parametrize("excess", [1, 100_000])
def test_long_lists_are_refused_with_their_length_and_the_limit(field, most, filled, excess):
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**{field: filled(most + excess)})
    assert refused.value.param == field
    assert str(refused.value).startswith(f"{field} has {most + excess} ")
    assert f"at most {most} " in str(refused.value)


def test_min_tokens_needs_no_max_tokens():
    assert SamplingParams(max_tokens=None, min_tokens=500).min_tokens == 500


@pytest.mark.parametrize(
    "params", [{"logit_bias": {100: 1.0}}, {"stop_token_ids": (100,)}, {"stop_token_ids": (-1,)}]
)
def test_token_ids_the_model_does_not_have_are_refused(params: dict):
    with pytest.raises(InvalidRequest, match="0 to 99") as refused:
        SamplingParams(**params).check_vocabulary(100)
    assert refused.value.param == next(iter(params))


def test_the_last_token_id_is_allowed():
    SamplingParams(logit_bias={99: 1.0}, stop_token_ids=(0, 99)).check_vocabulary(100)


def test_zero_temperature_is_greedy():
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams().is_greedy


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 1.1}],
)
def test_penalties_count_tokens_and_nothing_else_does(params: dict):
    assert SamplingParams(**params).counts_tokens
    assert not SamplingParams(temperature=0.5, logit_bias={1: 1.0}).counts_tokens


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        SamplingParams().n = 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1.5),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("stop", (3,)),
        ("stop_token_ids", 3),
        ("stop_token_ids", ("a",)),
        ("logit_bias", {"a": 1.0}),
        ("output_kind", "whole"),
        ("ignore_eos", 1),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_lists_and_a_single_stop_string_are_taken_as_people_write_them():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[5, 6]).stop_token_ids == (5, 6)
