"""The batch job: every line is answered once, whatever is wrong with one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from batch_job import run

from pie_async import SamplingParams

pytestmark = [pytest.mark.asyncio, pytest.mark.virtual_time]


def answers(path: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines), "a line was answered twice"
    return {line["id"]: line for line in lines}


async def test_every_line_is_answered_once_and_a_second_run_does_the_rest(tmp_path, capsys):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    jobs = [{"id": number, "prompt": f"prompt {number}"} for number in range(300)]
    jobs[7]["prompt"] = ""
    source.write_text("\n".join(map(json.dumps, jobs[:200])) + "\n\n")
    params = SamplingParams(max_tokens=4, output_kind="final")
    options = {"device": "sim", "model": "tiny"}
    assert await run(source, target, params, **options) == 200
    source.write_text("\n".join(map(json.dumps, jobs)))
    assert await run(source, target, params, **options) == 100
    found = answers(target)
    assert found.keys() == set(range(300))
    assert found[7] == {"id": 7, "error": "the prompt is empty"}
    assert all(len(each["text"]) == 4 for number, each in found.items() if number != 7)
    assert "200/200" in capsys.readouterr().out
