"""Plans of faults: strictly read, refused where they cannot bite, the same every time."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pie_async.errors import ConfigError
from pie_async.runtime.faults import (
    POINTS,
    ActorRaises,
    ApiKilled,
    CopyFailed,
    CopySlow,
    FaultPlan,
    Faults,
    KernelSlow,
    LogDiskFull,
    MailDelayed,
    SlowReader,
)
from pie_async.runtime.faulty_actors import check_names, log_on_full_disk

NAMES = {
    *("copy_slow", "copy_stuck", "copy_failed", "copy_corrupted", "kernel_slow"),
    *("event_never_fires", "device_out_of_memory", "arena_refused", "pool_refused"),
    *("pinning_refused", "sticky_error", "lost_context", "mail_delayed", "actor_raises"),
    *("engine_killed", "api_killed", "slow_reader", "vanished_client", "clock_jump"),
    "log_disk_full",
}


def test_there_is_a_point_for_every_failure_that_is_to_be_survived():
    assert set(POINTS) == NAMES


def test_a_plan_is_read_from_json_and_from_toml(tmp_path: Path):
    plan = FaultPlan(
        faults=(
            CopySlow(at=(2, 5), copies=("stage",), seconds=0.5),
            MailDelayed(probability=0.25, seed=7, actors=("scheduler",), seconds=1e-3),
        )
    )
    as_json = tmp_path / "plan.json"
    as_json.write_text(
        json.dumps(
            {
                "faults": [
                    {"point": "copy_slow", "at": [2, 5], "copies": ["stage"], "seconds": 0.5},
                    {
                        "point": "mail_delayed",
                        "probability": 0.25,
                        "seed": 7,
                        "actors": ["scheduler"],
                        "seconds": 1e-3,
                    },
                ]
            }
        )
    )
    as_toml = tmp_path / "plan.toml"
    as_toml.write_text(
        '[[faults]]\npoint = "copy_slow"\nat = [2, 5]\ncopies = ["stage"]\nseconds = 0.5\n'
        '[[faults]]\npoint = "mail_delayed"\nprobability = 0.25\nseed = 7\n'
        'actors = ["scheduler"]\nseconds = 1e-3\n'
    )
    assert FaultPlan.read(as_json) == FaultPlan.read(as_toml) == plan


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ([{"point": "copy_slwo", "at": [1]}], r"faults\[0\].*'copy_slwo'; there are copy_slow, "),
        ([{"at": [1]}], r"there is no fault point None; there are"),
        (["copy_slow"], r"there is no fault point None; there are"),
        ([{"point": "copy_slow", "at": [1]}], r"missing required field `seconds`.*faults\[0\]"),
        ([{"point": "copy_stuck", "at": [1], "seconds": 1}], r"unknown field `seconds`"),
        ([{"point": "copy_stuck", "at": [1], "copies": ["in"]}], r"'in'.*faults\[0\]\.copies"),
        ([{"point": "copy_stuck"}], r"copy_stuck: give either `at`"),
        ([{"point": "copy_stuck", "at": [1], "probability": 0.5}], r"copy_stuck: give either"),
        ([{"point": "copy_stuck", "at": [0]}], r"counted from 1"),
        ([{"point": "copy_stuck", "probability": 1.5}], r"must be 0 to 1, not 1\.5"),
        ([{"point": "kernel_slow", "at": [1], "seconds": -1}], r"at least 0, not -1"),
        (
            [{"point": "pinning_refused", "at": [1], "share": 1.5}],
            r"share must be 0 to 1, not 1\.5",
        ),
        ("copy_slow", r"Expected `array`, got `str`"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_place_and_what_is_possible(faults, says: str):
    with pytest.raises(ConfigError, match=says):
        FaultPlan.of({"faults": faults})


def test_a_file_that_is_no_plan_is_named(tmp_path: Path):
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match=r"cannot read .*plan\.json: No such file"):
        FaultPlan.read(path)


@pytest.mark.parametrize("suffix", ["json", "toml"])
@pytest.mark.parametrize(
    "data",
    [b"{", b"\xff", b"faults = " + b"[" * 5000, b"[" * 100_000, b"lives = " + b"9" * 5000],
    ids=["cut", "no text", "deep", "deeper", "digits"],
)
def test_a_file_that_holds_no_plan_is_refused_whatever_it_holds(tmp_path: Path, suffix, data):
    path = tmp_path / f"plan.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"cannot read .*plan\.{suffix}: "):
        FaultPlan.read(path)


def test_a_plan_for_no_life_is_refused():
    with pytest.raises(ConfigError, match="for 0 lives"):
        FaultPlan(faults=(), lives=0)


def test_a_fault_bites_at_its_occurrences_among_the_places_that_are_meant():
    faults = Faults(FaultPlan(faults=(CopyFailed(at=(2, 3), copies=("promote",)),)))
    kinds = ("promote", "stage", "promote", "demote", "promote", "promote")
    bitten = [faults.at(CopyFailed, copy=kind) is not None for kind in kinds]
    assert bitten == [False, False, True, False, True, False]
    assert faults.at(KernelSlow) is None
    assert faults.bites == {"copy_failed": 2}


def test_what_is_drawn_is_the_same_for_the_same_seed_and_about_as_frequent_as_asked():
    def drawn(seed: int) -> list[bool]:
        faults = Faults(FaultPlan(faults=(SlowReader(probability=0.2, seed=seed, seconds=1.0),)))
        return [faults.at(SlowReader) is not None for _ in range(2000)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 300 < sum(drawn(1)) < 500


def test_two_faults_of_one_point_count_by_themselves_and_the_first_that_bites_is_taken():
    first, second = KernelSlow(at=(2,), seconds=1.0), KernelSlow(at=(1, 2), seconds=2.0)
    faults = Faults(FaultPlan(faults=(first, second)))
    assert [faults.at(KernelSlow) for _ in range(3)] == [second, first, second]


def test_faults_that_have_no_place_are_refused():
    plan = FaultPlan(faults=(ApiKilled(at=(1,)), CopyFailed(at=(1,))))
    with pytest.raises(ConfigError, match="api_killed cannot happen here: there is no server"):
        plan.refuse(ApiKilled, why="there is no server")
    plan.without(ApiKilled).refuse(ApiKilled, why="there is no server")
    assert [fault.point for fault in plan.only(ApiKilled).faults] == ["api_killed"]


@pytest.mark.parametrize("where", [{"actors": ("shceduler",)}, {"messages": ("Sumbit",)}])
def test_an_actor_or_message_that_there_is_not_is_named_with_those_there_are(where: dict):
    plan = FaultPlan(faults=(ActorRaises(at=(1,), **where),))
    with pytest.raises(ConfigError, match=r"'(shceduler|Sumbit)'; there are (Submit|scheduler)"):
        check_names(plan, actors=("scheduler",), messages=("Submit",))


def test_a_log_on_a_full_disk_costs_its_lines_and_nothing_else(caplog, capsys):
    log = logging.getLogger("pie_async.somewhere")
    faults = Faults(FaultPlan(faults=(LogDiskFull(at=(1, 2)),)))
    with log_on_full_disk(faults):
        for number in range(3):
            log.warning("line %d", number)
    log.warning("after it")
    assert faults.bites["log_disk_full"] == 2
    assert [record.message for record in caplog.records] == [
        *("line 0", "line 1", "line 2", "after it"),
    ]
    assert "No space left on device" in capsys.readouterr().err
