"""The synchronous interface: prompts in, outputs in the same order; errors as they are."""

from __future__ import annotations

import threading

import pytest

from pie_async import LLM, SamplingParams
from pie_async.errors import ConfigError, EngineStopped, InvalidRequest


@pytest.fixture(scope="module")
def llm():
    with LLM(device="sim", model="tiny") as running:
        yield running


def asks(max_tokens: int = 5, **params) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=1, **params)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM):
    prompts = [[i] * (1 + 40 * (i % 3)) for i in range(12)]
    outputs = llm.generate(prompts, [asks(1 + (i * 5) % 17) for i in range(12)], progress=False)
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [len(out.outputs[0].token_ids) for out in outputs] == [
        1 + (i * 5) % 17 for i in range(12)
    ]
    assert all(output.finished for output in outputs)


def test_one_text_or_one_list_of_token_ids_is_one_prompt(llm: LLM):
    (text,) = llm.generate("Hello", asks(), progress=False)
    assert text.prompt == "Hello"
    (tokens,) = llm.generate([1, 2, 3], asks(), progress=False)
    assert tokens.prompt_token_ids == (1, 2, 3)
    assert tokens.prompt is None


def test_texts_and_token_ids_can_be_mixed(llm: LLM):
    outputs = llm.generate(["Hello", [1, 2, 3]], asks(), progress=False)
    assert [output.prompt for output in outputs] == ["Hello", None]


@pytest.mark.parametrize("text", ["Hello", ["Hello", "there"]])
def test_chat_refuses_a_text_instead_of_taking_it_apart(llm: LLM, text):
    with pytest.raises(InvalidRequest, match="a conversation is a list of messages"):
        llm.chat(text, asks(), progress=False)


def test_no_prompts_give_no_outputs(llm: LLM):
    assert llm.generate([], asks(), progress=False) == []


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
def test_each_output_is_complete_whatever_kind_was_asked_for(llm: LLM, kind):
    (output,) = llm.generate("Hello", asks(9, n=2, output_kind=kind), progress=False)
    assert [len(out.token_ids) for out in output.outputs] == [9, 9]
    assert {out.finish_reason for out in output.outputs} == {"length"}


def test_without_params_there_are_defaults(llm: LLM):
    (output,) = llm.generate("Hello", progress=False)
    assert len(output.outputs[0].token_ids) == 16


def test_as_many_params_as_prompts_or_one(llm: LLM):
    with pytest.raises(InvalidRequest, match="2 prompts but 3 SamplingParams"):
        llm.generate(["a", "b"], [asks()] * 3, progress=False)


def test_a_prompt_that_cannot_run_raises_its_own_error_and_the_rest_is_cancelled(llm: LLM):
    with pytest.raises(InvalidRequest, match="token id 5000"):
        llm.generate([[1], [5000], [2]], asks(1000), progress=False)
    (output,) = llm.generate("Hello", asks(), progress=False)
    assert output.finished
    stats = llm.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_one_conversation_or_several_are_chatted_with(llm: LLM):
    turn = [{"role": "user", "content": "Who goes there?"}]
    (one,) = llm.chat(turn, asks(), progress=False)
    several = llm.chat([turn, turn], asks(), progress=False)
    assert [output.prompt_token_ids for output in several] == [one.prompt_token_ids] * 2


def test_more_prompts_than_the_queue_holds_are_fine():
    with LLM(device="sim", model="tiny", max_queued_requests=3) as llm:
        outputs = llm.generate([[i] for i in range(20)], asks(), progress=False)
    assert len(outputs) == 20


def test_thousands_of_prompts_at_once_are_fine(llm: LLM):
    outputs = llm.generate([[i % 1000] for i in range(3000)], asks(2), progress=False)
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 6000


def test_progress_is_shown_and_leaves_nothing_behind(llm: LLM, capsys: pytest.CaptureFixture):
    llm.generate(["a", "b"], asks(), progress=True)
    assert "Traceback" not in capsys.readouterr().err


def test_it_can_be_used_from_several_threads(llm: LLM):
    results: dict[int, int] = {}

    def work(number: int) -> None:
        (output,) = llm.generate([[number]], asks(20), progress=False)
        results[number] = len(output.outputs[0].token_ids)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), 20)


def test_it_describes_its_model(llm: LLM):
    assert llm.model.name == "tiny"
    assert llm.model.vocab_size == 1024


def test_closing_twice_does_nothing():
    llm = LLM(device="sim", model="tiny")
    llm.close()
    llm.close()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"device_kv_bytes": 1000}, "device_kv_bytes"),
        ({"max_model_len": 10**9}, "max_model_len"),
        ({"model": "no-such-shape"}, "model"),
        ({"sim_gpu": "no-such-gpu"}, None),
    ],
)
def test_options_that_cannot_work_raise_and_leave_no_thread(options: dict, option: str | None):
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConfigError) as refused:
        LLM(device="sim", **{"model": "tiny", **options})
    if option is not None:
        assert refused.value.option == option
    assert "pie-llm" not in {t.name for t in threading.enumerate()} - before


def test_after_close_it_says_that_it_is_closed():
    llm = LLM(device="sim", model="tiny")
    llm.close()
    with pytest.raises(EngineStopped, match="closed"):
        llm.generate("Hello", progress=False)
    with pytest.raises(EngineStopped, match="closed"):
        llm.stats()
