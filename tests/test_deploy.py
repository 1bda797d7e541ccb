"""What is in deploy/ names only what there is."""

from __future__ import annotations

import asyncio
import configparser
import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pie_async.api.prometheus import ServerMetrics
from pie_async.cli.app import build
from pie_async.metrics import EngineStats
from pie_async.outputs import SequenceTimes
from tests.support.fake_engine import FakeEngine

DEPLOY = Path(__file__).parent.parent / "deploy"


def dashboard_expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def alerts() -> list[dict]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[tuple[str, str]]]:
    """The labels and their values of every series that a server has, by name."""
    return asyncio.run(scrape())  # one metric counts the loop's tasks


async def scrape() -> dict[str, set[tuple[str, str]]]:
    metrics = ServerMetrics(FakeEngine(snapshot=EngineStats()))
    metrics.observe_ttft(1)
    metrics.observe_itl(1)
    metrics.observe_e2e(1)
    metrics.observe_times(SequenceTimes(queued_s=1, prefill_s=1, decode_s=1))
    metrics.count_finished("stop")
    for status in (200, 429, 500):
        metrics.count_response("/v1/completions", status)
    found: dict[str, set[tuple[str, str]]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels.items())
    return found


def test_dashboard_and_alerts_ask_for_what_a_server_tells(exposed) -> None:
    expressions = [*dashboard_expressions(), *(rule["expr"] for rule in alerts())]
    assert len(expressions) > 30
    for expression in expressions:
        check(expression, exposed)


def check(expression: str, exposed: dict[str, set[tuple[str, str]]]) -> None:
    asked = re.findall(r"(pie:\w+)(?:\{([^}]*)\})?", expression)
    assert asked or expression.startswith("up{")
    labels: set[str] = set()
    for name, inside in asked:
        assert name in exposed, name
        labels |= {label for label, _ in exposed[name]}
        for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', inside):
            if label == "instance":
                continue
            values = {found for known, found in exposed[name] if known == label}
            matches = re.compile(value).fullmatch if operator == "=~" else value.__eq__
            assert any(map(matches, values)), (name, label, value)
    for by in re.findall(r"by \(([^)]*)\)", expression):
        assert {each.strip() for each in by.split(",")} <= labels | {"instance"}, by


def test_every_metric_of_the_engine_is_on_the_dashboard_or_is_left_out_on_purpose(exposed) -> None:
    shown = set(re.findall(r"pie:\w+", " ".join(dashboard_expressions())))
    left_out = {
        "pie:block_bytes", "pie:block_tokens", "pie:pooled_blocks", "pie:stall_share",
        "pie:link_busy_share", "pie:iterations_total", "pie:cache_evictions_total",
        "pie:sequences_finished_total", "pie:sequences_cancelled_total", "pie:demotions_total",
        "pie:promotions_total", "pie:sequences_begun_anew_total", "pie:phase_compute_seconds_total",
        "pie:phase_stall_seconds_total", "pie:phase_staging_seconds_total",
        "pie:choices_finished_total", "pie:event_loop_tasks", "pie:inference_seconds_bucket",
        "pie:event_loop_lag_seconds",
    }  # fmt: skip
    told = {name for name in exposed if not re.search(r"_(sum|count|created)$", name)}
    assert told - shown == left_out


def test_alerts_are_complete() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names) >= 8
    operating = (DEPLOY.parent / "docs/operating.md").read_text()
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["alert"] in operating, "docs/operating.md says what to do"


def test_panels_do_not_overlap_and_have_a_title() -> None:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def serve_flags() -> set[str]:
    (serve,) = (each for each in build(["serve"]).registered_commands if each.name == "serve")
    import typer.main

    command = typer.main.get_command_from_info(
        serve, pretty_exceptions_short=False, rich_markup_mode=None
    )
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("name", ["Dockerfile", "pie-async.service"])
def test_flags_that_deployments_use_exist(name: str) -> None:
    text = (DEPLOY / name).read_text()
    line = next(line for line in text.splitlines() if line.startswith(("ENTRYPOINT", "ExecStart")))
    flags = re.findall(r"--[a-z-]+", line)
    assert flags and set(flags) <= serve_flags()


def test_the_container_is_nobodys_root_and_says_whether_it_is_alive() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    steps = [line.split()[0] for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert steps.index("USER") < steps.index("ENTRYPOINT")
    user = re.search(r"^USER (\d+)$", text, re.MULTILINE)
    assert user and int(user[1]) > 0, "by number: orchestrators check that without looking names up"
    assert "USER root" not in text and ":latest" not in text
    assert "/health" in text and "STOPSIGNAL SIGTERM" in text and "memlock=-1" in text
    for source in re.findall(r"^COPY ((?:\S+ )+)\S+$", text, re.MULTILINE):
        for path in source.split():
            assert (DEPLOY.parent / path).exists(), path
    extras = re.search(r"\.\[([a-z,]+)\]", text)[1].split(",")
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def test_the_unit_can_pin_memory_and_leaves_time_to_finish() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "pie-async.service")
    service = unit["Service"]
    assert service["LimitMEMLOCK"] == "infinity"
    assert int(service["TimeoutStopSec"]) > 30  # --shutdown-timeout
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert "MemoryDenyWriteExecute" not in service  # Triton's kernels would not run
