"""The demonstration in small, and that it can fail."""

import io
import json
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from dpnc import cli
from dpnc.demo import Plan, Report
from dpnc.demo.panel import save_panel
from dpnc.demo.report import judged, report_tables
from dpnc.demo.resident import ResidentPeak
from dpnc.errors import ConfigError
from dpnc.image import load

MIB = 1 << 20


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(cli.app, ["demo", "--steps", "8", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    return out, msgspec.json.decode(result.stdout, type=Report)


def test_a_killed_process_loses_nothing_that_was_committed(small_run):
    _, report = small_run
    assert report.killed_by == "SIGKILL"
    assert report.killed_after_steps > 0
    assert report.found_step == report.committed_step == 8
    assert report.found_digest == report.committed_digest


def test_a_run_through_a_budget_has_the_bits_of_a_run_in_memory(small_run):
    _, report = small_run
    assert report.found_digest == report.memory_digest
    assert report.picture_is_identical


def test_the_budget_is_smaller_than_the_field_and_holds(small_run):
    _, report = small_run
    assert report.plan.budget_bytes < report.materialised_bytes
    assert report.store_peak_bytes <= report.plan.budget_bytes
    assert report.serve_store_peak_bytes <= report.plan.serve_budget_bytes
    assert report.page_faults > 0
    assert 0.0 < report.hit_ratio < 1.0


def test_the_results_stay_and_the_stores_do_not(small_run):
    out, report = small_run
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "report.json"]
    assert msgspec.json.decode((out / "report.json").read_bytes(), type=Report) == report
    assert load(out / "demo.png").shape[1] > 1000


def good_report():
    return Report(
        plan=Plan(),
        machine="",
        width=8,
        height=8,
        field_bytes=28 * MIB,
        state_bytes=120 * MIB,
        workspace_bytes=8 * MIB,
        store_peak_bytes=24 * MIB,
        process_peak_bytes=26 * MIB,
        process_peak_is_exact=True,
        page_faults=10,
        hit_ratio=0.5,
        bytes_read=1,
        bytes_written=1,
        fit_s=1.0,
        memory_fit_s=1.0,
        queries_per_s_cold=1.0,
        queries_per_s_warm=2.0,
        serve_store_peak_bytes=MIB,
        psnr_db=31.0,
        killed_by="SIGKILL",
        killed_after_steps=3,
        killed_bytes_written=1,
        committed_step=Plan().steps,
        found_step=Plan().steps,
        committed_digest="a",
        found_digest="a",
        memory_digest="a",
        picture_is_identical=True,
        total_s=1.0,
    )


def test_a_good_report_holds():
    report = judged(good_report())
    assert report.holds
    assert all(promise.held for promise in report.promises)
    assert " NO " not in text_of(report)


@pytest.mark.parametrize(
    "changes",
    [
        {"state_bytes": 30 * MIB},
        {"plan": Plan(budget_bytes=40 * MIB)},
        {"store_peak_bytes": 24 * MIB + 1},
        {"serve_store_peak_bytes": 9 * MIB},
        {"process_peak_bytes": 57 * MIB},
        {"found_digest": "b"},
        {"found_step": 7},
        {"killed_by": "exit code 0"},
        {"killed_after_steps": 0},
        {"memory_digest": "b"},
        {"picture_is_identical": False},
        {"psnr_db": 29.9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_broken_promise_is_seen(changes):
    report = judged(msgspec.structs.replace(good_report(), **changes))
    assert not report.holds
    assert " NO " in text_of(report)


def text_of(report):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report_tables(report))
    return console.export_text()


def test_a_short_run_does_not_judge_the_picture():
    plan = Plan.of(steps=8)
    report = msgspec.structs.replace(good_report(), plan=plan, psnr_db=12.0)
    report = judged(msgspec.structs.replace(report, committed_step=8, found_step=8))
    assert report.holds
    assert None in {promise.held for promise in report.promises}


def test_the_config_of_the_repository_says_what_the_default_is():
    path = Path(__file__).parent.parent / "configs" / "demo.toml"
    assert Plan.load(path) == Plan()
    keys = set(tomllib.loads(path.read_text()))
    assert keys == {field.name for field in msgspec.structs.fields(Plan)} - {"image"}


def test_a_config_is_refused_by_name(tmp_path):
    path = tmp_path / "plan.toml"
    for text, named in (
        ("stepz = 3", "stepz"),
        ("steps = 'x'", "steps"),
        ("steps =", r"plan\.toml"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=named):
            Plan.of(config=path)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        Plan.of(config=tmp_path / "missing.toml")
    path.write_text("steps = 7\nn_levels = 3\n")
    assert Plan.of(steps=9, config=path) == Plan(steps=9, n_levels=3)


def test_a_plan_survives_the_way_to_another_process():
    plan = Plan.of(steps=3)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps({"stepz": 3}), type=Plan)


def test_a_resident_peak_sees_memory_that_was_touched_and_given_back():
    resident = ResidentPeak()
    block = np.ones(32 * MIB, dtype=np.uint8)
    resident.sample()
    assert block[-1] == 1
    del block
    assert resident.above_baseline_bytes >= 31 * MIB


@pytest.mark.parametrize("shape", [(40, 40), (30, 60), (60, 30)])
def test_a_panel_shows_pictures_of_any_proportion(tmp_path, shape):
    original = np.zeros((*shape, 3), dtype=np.float32)
    residency = np.ones((shape[0] // 4, shape[1] // 4), dtype=np.float32)
    save_panel(
        tmp_path / "panel.png", original, original + np.float32(0.1), residency, (0, 0, 0.5, 0.5)
    )
    assert load(tmp_path / "panel.png").shape[1] > 1000


def test_a_picture_too_small_is_refused_before_anything_is_fitted(tmp_path):
    Image.new("RGB", (40, 5)).save(tmp_path / "thin.png")
    result = CliRunner().invoke(cli.app, ["demo", "--image", str(tmp_path / "thin.png")])
    assert result.exit_code == 1
    assert "40 x 5" in result.stderr
