"""What a benchmark asks of an engine: request lengths and arrival times, seeded and pure.

ShareGPT and Alpaca themselves are not used; the generators are called `…-like` because they
only share those datasets' mean lengths, as quoted by vLLM's paper (SOSP'23, section 6.1).
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import msgspec

from pie_async.errors import ConfigError

PREFIX_TOKENS = 512
"""Tokens of one shared prefix block in Mooncake's traces."""


class WorkItem(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a workload: sizes only, `prompt_token_ids` makes its prompt."""

    arrival_s: float = 0.0
    """When it is sent, from the start of the run."""
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    """Equal ids at the same place mean equal `PREFIX_TOKENS` tokens of prompt."""


class LengthModel(msgspec.Struct, frozen=True, kw_only=True):
    """Log-normal prompt and output lengths with the given means, before clipping.

    The spreads (standard deviations of the logarithm) are ours: they give ShareGPT's long
    tail and Alpaca's narrow prompts.
    """

    prompt_mean: float
    prompt_spread: float
    output_mean: float
    output_spread: float


SHAREGPT_LIKE = LengthModel(
    prompt_mean=161.0, prompt_spread=1.2, output_mean=338.0, output_spread=0.9
)
ALPACA_LIKE = LengthModel(prompt_mean=19.0, prompt_spread=0.4, output_mean=58.0, output_spread=0.9)

LENGTH_MODELS: Mapping[str, LengthModel] = {
    "sharegpt-like": SHAREGPT_LIKE,
    "alpaca-like": ALPACA_LIKE,
}


def sample_lengths(
    model: LengthModel, *, num_requests: int, context_tokens: int, seed: int
) -> list[WorkItem]:
    """Requests with random lengths, all at once, each within the context."""
    rng = random.Random(seed)
    items = []
    for _ in range(num_requests):
        prompt = _log_normal(rng, model.prompt_mean, model.prompt_spread)
        output = _log_normal(rng, model.output_mean, model.output_spread)
        items.append(clip(WorkItem(prompt_tokens=prompt, output_tokens=output), context_tokens))
    return items


def _log_normal(rng: random.Random, mean: float, spread: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))


def fixed_lengths(
    *, prompt_tokens: int, output_tokens: int, num_requests: int, context_tokens: int
) -> list[WorkItem]:
    """Equal requests, all at once.

    Raises:
        ConfigError: they do not fit the context.
    """
    total = prompt_tokens + output_tokens
    if total > context_tokens:
        raise ConfigError(
            f"{prompt_tokens} prompt and {output_tokens} output tokens exceed the context of "
            f"{context_tokens}; lower --prompt-tokens or --output-tokens",
            option="prompt_tokens",
        )
    return [WorkItem(prompt_tokens=prompt_tokens, output_tokens=output_tokens)] * num_requests


def clip(item: WorkItem, context_tokens: int) -> WorkItem:
    """The request cut to the context: first its prompt to 3/4 of it, then its output."""
    prompt = min(item.prompt_tokens, max(1, context_tokens * 3 // 4))
    return msgspec.structs.replace(
        item,
        prompt_tokens=prompt,
        output_tokens=max(1, min(item.output_tokens, context_tokens - prompt)),
        prefix_ids=item.prefix_ids[: -(-prompt // PREFIX_TOKENS)],
    )


def arrive_at_rate(
    items: Iterable[WorkItem], *, requests_per_s: float, seed: int
) -> list[WorkItem]:
    """The same requests as a Poisson process: independent exponential gaps."""
    rng = random.Random(seed)
    now_s, arriving = 0.0, []
    for item in items:
        now_s += rng.expovariate(requests_per_s)
        arriving.append(msgspec.structs.replace(item, arrival_s=now_s))
    return arriving


def prompt_token_ids(
    item: WorkItem, *, number: int, vocab_size: int, first_token: int = 0, seed: int = 0
) -> list[int]:
    """Random token ids in first_token .. vocab_size - 1; the same call gives the same ids.

    Args:
        number: the request's place in the workload; sets prompts apart that share no prefix.
    """
    ids: list[int] = []
    for prefix in item.prefix_ids:
        ids += _random_ids(f"{seed}/prefix/{prefix}", PREFIX_TOKENS, first_token, vocab_size)
    rest = item.prompt_tokens - len(ids)
    if rest > 0:
        ids += _random_ids(f"{seed}/request/{number}", rest, first_token, vocab_size)
    return ids[: item.prompt_tokens]


def _random_ids(name: str, count: int, first: int, stop: int) -> list[int]:
    rng = random.Random(name)
    return rng.choices(range(first, stop), k=count)


# --- traces -----------------------------------------------------------------------------------


def read_trace(path: Path, *, limit: int | None = None) -> list[WorkItem]:
    """The first `limit` requests of a trace, the first one arriving at 0.

    `.csv` is the Azure LLM inference trace (TIMESTAMP, ContextTokens, GeneratedTokens),
    `.jsonl` Mooncake's (timestamp in ms, input_length, output_length, hash_ids).

    Raises:
        ConfigError: not there, of another kind, empty, or damaged; names the line.
    """
    readers = {".csv": _azure_items, ".jsonl": _mooncake_items}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _trace_error(f"{path} is no known trace; known are {' and '.join(readers)} files")
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            items = list(islice(reader(path, lines), limit))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise _trace_error(f"cannot read the trace {path}: {reason}") from error
    if not items:
        raise _trace_error(f"the trace {path} has no requests")
    return _from_zero(items)


def _from_zero(items: Sequence[WorkItem]) -> list[WorkItem]:
    first_s = min(item.arrival_s for item in items)
    return [
        msgspec.structs.replace(item, arrival_s=item.arrival_s - first_s)
        for item in sorted(items, key=lambda item: item.arrival_s)
    ]


_AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def _azure_items(path: Path, lines: Iterable[str]) -> Iterator[WorkItem]:
    rows = csv.reader(lines)
    header = next(rows, None)
    if header is None or [name.strip() for name in header] != _AZURE_COLUMNS:
        raise _trace_error(f"{path} line 1: the columns must be {', '.join(_AZURE_COLUMNS)}")
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise _trace_error(f"{path} line {rows.line_num}: {error}") from error
        if row is None:
            return
        if row:
            yield _azure_item(path, rows.line_num, row)


def _azure_item(path: Path, number: int, row: Sequence[str]) -> WorkItem:
    try:
        time, prompt, output = row
        # seven digits of a second's fraction, of which datetime reads six
        arrival_s = datetime.fromisoformat(time.strip()[:26]).replace(tzinfo=UTC).timestamp()
        item = WorkItem(arrival_s=arrival_s, prompt_tokens=int(prompt), output_tokens=int(output))
    except ValueError as error:
        raise _trace_error(
            f"{path} line {number}: expected a time and two token counts, got {','.join(row)!r}"
        ) from error
    return _checked(path, number, item)


class _MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _mooncake_items(path: Path, lines: Iterable[str]) -> Iterator[WorkItem]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise _trace_error(f"{path} line {number}: {error}") from error
        item = WorkItem(
            arrival_s=entry.timestamp / 1000,
            prompt_tokens=entry.input_length,
            output_tokens=entry.output_length,
            prefix_ids=entry.hash_ids,
        )
        yield _checked(path, number, item)


def _checked(path: Path, number: int, item: WorkItem) -> WorkItem:
    if item.prompt_tokens < 1 or item.output_tokens < 1:
        raise _trace_error(
            f"{path} line {number}: prompt and output must be at least 1 token, got "
            f"{item.prompt_tokens} and {item.output_tokens}"
        )
    return item


def _trace_error(message: str) -> ConfigError:
    return ConfigError(message, option="trace")
