"""The decoder computes what transformers computes, for every family and variant."""

from __future__ import annotations

import random

import pytest
import torch

from pie_async.model.config import read_config
from pie_async.model.weights import load_model
from tests.support.checkpoints import VARIANTS, greedy, write_checkpoint
from tests.support.direct_runner import DirectRunner

CPU = torch.device("cpu")
NUM_TOKENS = 12
LENGTHS = (1, 3, 4, 5, 13, 26, 31, 40)  # around block borders, beyond every window


def load(path, dtype=torch.float32):
    return load_model(path, read_config(path), dtype, CPU)


def prompts(vocab=97):
    rng = random.Random(5)
    return [[rng.randrange(vocab) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module", params=VARIANTS)
def peer(request, tmp_path_factory):
    """A decoder, and what transformers says for each prompt: (tokens, logits)."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    expected = [greedy(checkpoint.model, prompt, NUM_TOKENS) for prompt in prompts()]
    return load(checkpoint.path), expected, checkpoint


def assert_same(runner, outputs, expected):
    for lane, (output, (tokens, logits)) in enumerate(zip(outputs, expected, strict=True)):
        assert output == tokens
        torch.testing.assert_close(
            torch.stack(runner.logits[lane]), logits, rtol=0, atol=1e-4, msg=lambda m: m
        )


@pytest.mark.parametrize("chunk", [None, 6])
def test_batch_of_mixed_lengths_equals_transformers(peer, chunk):
    decoder, expected, _ = peer
    runner = DirectRunner(decoder)
    assert_same(runner, runner.generate(prompts(), NUM_TOKENS, chunk=chunk), expected)


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_single_sequence_equals_transformers(peer, chunk):
    decoder, expected, _ = peer
    runner = DirectRunner(decoder, lanes=1)
    assert_same(runner, runner.generate([prompts()[6]], NUM_TOKENS, chunk=chunk), [expected[6]])


def test_num_parameters_is_what_transformers_counts(peer):
    decoder, _, checkpoint = peer
    assert decoder.config.num_parameters == checkpoint.model.num_parameters()
