"""Weights load exactly, in little memory, and every defect names itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pie_async.errors import WeightsError
from pie_async.model.config import read_config
from pie_async.model.weights import load_model
from tests.support.checkpoints import greedy, write_checkpoint
from tests.support.direct_runner import DirectRunner

CPU = torch.device("cpu")
PROMPT = [3, 14, 15, 92, 65, 35]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(path, dtype=torch.float32, **kwargs):
    return load_model(path, read_config(path), dtype, CPU, **kwargs)


def in_float32(checkpoint):
    """Loaded anew: casting a model would leave its rotary frequencies rounded."""
    return type(checkpoint.model).from_pretrained(checkpoint.path, dtype=torch.float32)


def first_logits(decoder):
    runner = DirectRunner(decoder)
    runner.generate([PROMPT], 1)
    return runner.logits[0][0]


@pytest.fixture
def llama(tmp_path):
    return write_checkpoint(tmp_path)


@pytest.fixture
def edit(llama):
    """Change the checkpoint's tensors and try to load it."""

    def edit_and_load(change):
        file = llama.path / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return load(llama.path)

    return edit_and_load


def test_missing_tensor_is_named(edit):
    with pytest.raises(WeightsError, match=f"missing {Q_PROJ}"):
        edit(lambda tensors: tensors.pop(Q_PROJ))


def test_extra_tensor_is_named(edit):
    with pytest.raises(WeightsError, match=r"not part of this model: model\.surprise"):
        edit(lambda tensors: tensors.update({"model.surprise": torch.zeros(1)}))


def test_misshapen_tensor_is_named_with_both_shapes(edit):
    with pytest.raises(WeightsError, match=rf"{Q_PROJ} is \[3, 32\], should be \[32, 32\]"):
        edit(lambda tensors: tensors.update({Q_PROJ: torch.zeros(3, 32)}))


def test_many_missing_tensors_are_counted_not_listed(edit):
    with pytest.raises(WeightsError, match=r"and \d+ more") as caught:
        edit(lambda tensors: [tensors.pop(name) for name in list(tensors)[:20]])
    assert len(str(caught.value)) < 600


def test_integer_weights_are_refused(edit):
    with pytest.raises(WeightsError, match="I8 tensors"):
        edit(lambda t: t.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}))


def test_derived_tensors_of_old_checkpoints_are_skipped(edit, llama):
    decoder = edit(
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    _, expected = greedy(llama.model, PROMPT, 1)
    torch.testing.assert_close(first_logits(decoder), expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_checkpoint_may_hold_either_or_both_names(tmp_path, kept):
    checkpoint = write_checkpoint(tmp_path, "llama-mha-tied")
    _, expected = greedy(checkpoint.model, PROMPT, 1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    shared = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, kept: shared}, file)
    torch.testing.assert_close(first_logits(load(tmp_path)), expected[0], rtol=0, atol=1e-4)
    save_file({**tensors, "model.embed_tokens.weight": shared, "lm_head.weight": shared + 0}, file)
    torch.testing.assert_close(first_logits(load(tmp_path)), expected[0], rtol=0, atol=1e-4)


def test_bare_model_names_of_early_opt_checkpoints_load(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "opt")
    file = tmp_path / "model.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(file).items()}, file)
    _, expected = greedy(checkpoint.model, PROMPT, 1)
    torch.testing.assert_close(first_logits(load(tmp_path)), expected[0], rtol=0, atol=1e-4)


def test_shards_load_like_one_file(tmp_path):
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (first_logits(load(tmp_path / name)) for name in ("one", "many"))
    assert torch.equal(one, many)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7]
)
def test_index_that_leaves_the_directory_is_refused(tmp_path, file):
    write_checkpoint(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {Q_PROJ: file}}))
    with pytest.raises(WeightsError, match="not a file beside it"):
        load(tmp_path)


def test_index_that_promises_too_much_is_refused(tmp_path):
    write_checkpoint(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"model\.more, which model\.safetensors\.index\.json"):
        load(tmp_path)


def test_missing_shard_is_named(tmp_path):
    write_checkpoint(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsError, match=shard.name):
        load(tmp_path)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        (4).to_bytes(8, "little") + b"null",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        header(a=entry()),  # no data
        header(a=entry(), b=entry(offsets=(8, 24))) + bytes(24),  # overlap
        header(a=entry(shape=(2, 3))) + bytes(16),
        header(a=entry(shape=(-2, -2))) + bytes(16),
        header(a=entry(offsets=(16, 0))) + bytes(16),
        header(a=entry(shape=(2**40, 2**40))) + bytes(16),
        header(a={"dtype": "F32"}),
        header(a=7),
        b"PK\x03\x04 not safetensors at all",
    ],
)
def test_damaged_file_is_one_clear_error(llama, content):
    (llama.path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load(llama.path)


def test_file_cut_short_is_refused(llama):
    file = llama.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="incomplete"):
        load(llama.path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_unread(llama, name):
    (llama.path / "model.safetensors").rename(llama.path / name)
    with pytest.raises(WeightsError, match="pickle") as caught:
        load(llama.path)
    assert name in str(caught.value)


def test_directory_without_weights_says_what_is_looked_for(llama):
    (llama.path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        load(llama.path)


def test_progress_reaches_the_total(llama):
    seen = []
    load(llama.path, progress=lambda done, total: seen.append((done, total)))
    dones, totals = zip(*seen, strict=True)
    assert list(dones) == sorted(dones)
    assert set(totals) == {dones[-1]} == {llama.model.num_parameters() * 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "opt-post-norm-projected"])
def test_half_precision_computes_what_transformers_computes(tmp_path, dtype, variant):
    checkpoint = write_checkpoint(tmp_path, variant, dtype=dtype)
    assert read_config(tmp_path).dtype == str(dtype).removeprefix("torch.")
    runner = DirectRunner(load(tmp_path, dtype))
    outputs = runner.generate([PROMPT, PROMPT[:2]], 4, chunk=4)
    exact = in_float32(checkpoint)
    for lane, prompt in enumerate((PROMPT, PROMPT[:2])):
        _, expected = greedy(exact, prompt + outputs[lane][:3], 1)
        error = (runner.logits[lane][3] - expected[0]).abs().max() / expected.std()
        assert error < (0.05 if dtype == torch.float16 else 0.4)


def test_checkpoint_in_half_precision_loads_exactly_into_float32(tmp_path):
    checkpoint = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    _, expected = greedy(in_float32(checkpoint), PROMPT, 1)
    torch.testing.assert_close(first_logits(load(tmp_path)), expected[0], rtol=0, atol=1e-4)


_MEASURE = """
import resource, sys, torch
from pathlib import Path
from pie_async.model.config import read_config
from pie_async.model.weights import load_model
path = Path(sys.argv[1])
torch.ones(64, 64) @ torch.ones(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoder = load_model(path, read_config(path), torch.float32, torch.device("cpu"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("tied", [False, True])
def test_loading_peaks_at_the_model_plus_its_largest_tensor(tmp_path, tied):
    checkpoint = write_checkpoint(
        tmp_path,
        vocab_size=24_000,
        hidden_size=512,
        intermediate_size=1536,
        tie_word_embeddings=tied,
    )
    sizes = [parameter.nbytes for parameter in checkpoint.model.parameters()]
    process = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(process.stdout) <= sum(sizes) + max(sizes)
