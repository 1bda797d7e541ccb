"""The model shipped with the package: small, documented, and it writes plays."""

import re

import pytest

from pie_async import LLM, SamplingParams
from pie_async.model.checkpoint import resolve_model

COMMON = re.findall(
    r"\w+",
    "the and to i of my a you that in is not with me it be your his this for but have he "
    "thou as thy will what so him we our no by shall do are thee on her if they good now "
    "all or sir from come at lord would was which how there then love let us an when their "
    "am more king man than them may like go here say well such give make o why ",
)
SPEECH = re.compile(r"[A-Z][A-Za-z ]+:\n")


@pytest.fixture(scope="module")
def llm():
    with LLM(device_kv_bytes=8 * 2**20, host_pool_bytes=0, cpu_threads=1) as running:
        yield running


def test_its_weights_are_no_larger_than_12_mb_and_its_card_tells_the_held_out_loss():
    path = resolve_model("builtin")
    assert (path / "model.safetensors").stat().st_size <= 12_000_000
    card = (path / "README.md").read_text()
    for fact in ("held out", "the last 10 %", "per byte", "steps", "public domain"):
        assert fact in card


@pytest.mark.realtime
def test_chat_replies_are_speeches_that_end_by_themselves(llm):
    questions = ["Who goes there?", "Tell me of love.", "What news of the king?", "Good morrow."]
    params = SamplingParams(max_tokens=600, temperature=0.8, top_p=0.95, seed=1)
    replies = llm.chat(
        [[{"role": "user", "content": q}] for q in questions], params, progress=False
    )
    texts = [reply.outputs[0].text for reply in replies]
    assert all(SPEECH.match(text) for text in texts)
    assert [reply.outputs[0].finish_reason for reply in replies].count("stop") >= 3


@pytest.mark.realtime
def test_its_text_is_made_of_common_english_words_not_noise(llm):
    params = SamplingParams(max_tokens=200, temperature=0.8, top_p=0.95, seed=2, ignore_eos=True)
    [output] = llm.generate("KING RICHARD III:\n", params, progress=False)
    words = re.findall(r"[a-z']+", output.outputs[0].text.lower())
    assert len(words) > 80
    assert sum(word in COMMON for word in words) / len(words) > 0.4
