"""Workloads: lengths, arrivals and prompts are seeded; damaged traces are refused by line."""

import math
from statistics import fmean, stdev

import pytest

from pie_async.errors import ConfigError
from pie_async.workload import (
    ALPACA_LIKE,
    PREFIX_TOKENS,
    SHAREGPT_LIKE,
    WorkItem,
    arrive_at_rate,
    clip,
    fixed_lengths,
    prompt_token_ids,
    read_trace,
    sample_lengths,
)


@pytest.mark.parametrize(
    ("model", "prompt", "output"), [(SHAREGPT_LIKE, 161, 338), (ALPACA_LIKE, 19, 58)]
)
def test_lengths_have_the_quoted_means_when_the_context_does_not_clip(model, prompt, output):
    items = sample_lengths(model, num_requests=40_000, context_tokens=1_000_000, seed=1)
    assert fmean(item.prompt_tokens for item in items) == pytest.approx(prompt, rel=0.05)
    assert fmean(item.output_tokens for item in items) == pytest.approx(output, rel=0.05)


def test_lengths_are_log_normal_with_the_spread_asked_for():
    items = sample_lengths(SHAREGPT_LIKE, num_requests=20_000, context_tokens=10**9, seed=2)
    logs = [math.log(item.output_tokens) for item in items]
    assert stdev(logs) == pytest.approx(SHAREGPT_LIKE.output_spread, rel=0.03)


def test_every_request_fits_the_context_and_has_a_prompt_and_an_output():
    items = sample_lengths(SHAREGPT_LIKE, num_requests=2_000, context_tokens=64, seed=3)
    assert all(item.prompt_tokens >= 1 and item.output_tokens >= 1 for item in items)
    assert max(item.prompt_tokens + item.output_tokens for item in items) == 64


@pytest.mark.parametrize("context", [2, 3, 5, 100])
def test_clipping_leaves_room_for_output_in_the_smallest_contexts(context):
    item = clip(WorkItem(prompt_tokens=10_000, output_tokens=10_000), context)
    assert item.prompt_tokens >= 1
    assert item.output_tokens >= 1
    assert item.prompt_tokens + item.output_tokens <= context


def test_the_same_seed_gives_the_same_workload_and_another_seed_another():
    def make(seed):
        items = sample_lengths(SHAREGPT_LIKE, num_requests=50, context_tokens=4096, seed=seed)
        return arrive_at_rate(items, requests_per_s=3.0, seed=seed)

    assert make(4) == make(4)
    assert make(4) != make(5)


def test_arrivals_are_a_poisson_process_of_the_rate():
    items = arrive_at_rate(
        fixed_lengths(prompt_tokens=1, output_tokens=1, num_requests=20_000, context_tokens=9),
        requests_per_s=8.0,
        seed=6,
    )
    times = [item.arrival_s for item in items]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert stdev(gaps) == pytest.approx(1 / 8, rel=0.05)  # of an exponential: its mean


def test_fixed_lengths_beyond_the_context_are_refused_naming_the_flag():
    with pytest.raises(ConfigError, match="--prompt-tokens"):
        fixed_lengths(prompt_tokens=60, output_tokens=60, num_requests=1, context_tokens=100)


def test_prompts_have_their_length_stay_in_range_and_differ_between_requests():
    item = WorkItem(prompt_tokens=700, output_tokens=1)
    first, again, other = (
        prompt_token_ids(item, number=n, vocab_size=50, first_token=10, seed=1) for n in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(first) == 700
    assert min(first) >= 10
    assert max(first) < 50


def test_equal_prefix_ids_give_equal_prompt_beginnings():
    def ids(number, prefix_ids):
        item = WorkItem(prompt_tokens=1100, output_tokens=1, prefix_ids=prefix_ids)
        return prompt_token_ids(item, number=number, vocab_size=1000)

    one, two = ids(0, (7, 8)), ids(1, (7, 9))
    assert one[:PREFIX_TOKENS] == two[:PREFIX_TOKENS]
    assert one[PREFIX_TOKENS : 2 * PREFIX_TOKENS] != two[PREFIX_TOKENS : 2 * PREFIX_TOKENS]
    assert one[2 * PREFIX_TOKENS :] != two[2 * PREFIX_TOKENS :]


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_traces_keep_their_gaps_and_start_at_zero(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        AZURE + "2023-11-16 23:59:59.5000000,374,44\r\n2023-11-17 00:00:01.7500001,396,109\n"
    )
    assert read_trace(path) == [
        WorkItem(arrival_s=0.0, prompt_tokens=374, output_tokens=44),
        WorkItem(arrival_s=2.25, prompt_tokens=396, output_tokens=109),
    ]


def test_mooncake_traces_keep_prefix_ids_and_milliseconds(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 1000, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]}\n\n'
        '{"timestamp": 2500, "input_length": 5, "output_length": 6, "hash_ids": [3]}\n'
    )
    first, second = read_trace(path)
    assert first == WorkItem(prompt_tokens=600, output_tokens=4, prefix_ids=(1, 2))
    assert (second.arrival_s, second.prompt_tokens) == (1.5, 5)


def test_only_the_first_requests_of_a_trace_are_read(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE + "2023-11-16 18:00:00,1,2\n2023-11-16 18:00:01,3,4\nbroken\n")
    assert len(read_trace(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "a,b\n", "line 1: the columns must be TIMESTAMP"),
        ("t.csv", AZURE + "2023-11-16 18:00:00,1,2\n2023-11-16 18:00:01,x,2\n", "line 3"),
        ("t.csv", AZURE + "yesterday,1,2\n", "line 2"),
        ("t.csv", AZURE + "2023-11-16 18:00:00,1\n", "line 2"),
        ("t.csv", AZURE + "2023-11-16 18:00:00,0,5\n", "at least 1 token"),
        ("t.csv", AZURE, "no requests"),
        ("t.jsonl", '{"timestamp": 1', "line 1"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 5}\n', "output_length"),
        ("t.jsonl", '{"timestamp": 1, "input_length": "5", "output_length": 1}\n', "line 1"),
        ("t.parquet", "", "known are .csv and .jsonl"),
    ],
)
def test_damaged_traces_are_refused_naming_file_and_place(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refusal:
        read_trace(path)
    assert name in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_traces_that_are_missing_or_no_text_are_refused(tmp_path, content):
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(path)
