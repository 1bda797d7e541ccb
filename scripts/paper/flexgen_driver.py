"""Runs FlexGen's own benchmark in a process that has it on its path.

    python flexgen_driver.py '["--model", "facebook/opt-13b", "--path", "_DUMMY_", ...]'

What it would look up on the network, a tokenizer that makes a prompt, is stood in for; the
numbers that it would write to a log file are printed as a line "RESULT {...}".
"""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace
from typing import Any

LOGGED = (
    "filename", "model_bytes", "cache_bytes", "hidden_bytes", "gpu_peak_bytes", "is_projected",
    "prefill_s", "prefill_tokens_per_s", "decode_s", "decode_tokens_per_s", "total_s",
    "total_tokens_per_s",
)  # fmt: skip
"""Arguments of write_benchmark_log, flexgen/utils.py."""


class Tokenizer:
    """Gives prompts of the length that is asked for; their text does not matter."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Tokenizer:
        return cls()

    def __call__(self, prompts: list[str], *, max_length: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[2 + i % 1000 for i in range(max_length)]] * len(prompts))


def tell(*values: Any) -> str:
    """In place of its log file."""
    found = dict(zip(LOGGED, values, strict=True))
    del found["filename"]
    print("RESULT " + json.dumps(found), flush=True)
    return ""


def main() -> None:
    """Run it once."""
    from flexgen import flex_opt

    flex_opt.AutoTokenizer = Tokenizer
    flex_opt.write_benchmark_log = tell
    parser = argparse.ArgumentParser()
    flex_opt.add_parser_arguments(parser)
    flex_opt.run_flexgen(parser.parse_args(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
