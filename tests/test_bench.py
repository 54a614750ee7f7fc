"""Benchmarks run, with small parameters, so that they do not rot; nothing is timed here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cgroup, lookup, page_faults
from bench.contenders import CONTENDERS
from bench.patterns import PATTERNS, batches

SIZES = ["--mib", "32", "--cache-mib", "8", "--batch", "8", "--seconds", "0.05", "--rounds", "1"]


def test_page_faults_measures_every_contender_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_faults.main([*SIZES, "--directory", str(tmp_path), "--patterns", "zipf", "--json"])
    found = json.loads(capsys.readouterr().out)
    measured = found["patterns"]["zipf"]
    assert {"direct reads", "store"} <= set(measured)
    assert set(measured) | set(found["refused"]) - {"fio"} == {each.name for each in CONTENDERS}
    assert all(figure > 0 for row in measured.values() for figure in row.values())
    assert list(tmp_path.iterdir()) == []


def test_page_faults_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [*SIZES, "--directory", str(tmp_path), "--patterns", "uniform"]
    page_faults.main([*sizes, "--only", "direct reads", "store"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("store") and " 1.00" in line for line in lines)


def test_page_faults_passes_over_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "MEMORY", tmp_path / "none")
    sizes = [*SIZES, "--directory", str(tmp_path), "--patterns", "uniform"]
    page_faults.main([*sizes, "--only", "direct reads", "memmap, RANDOM"])
    assert "without memmap, RANDOM: there is no memory cgroup" in capsys.readouterr().out


def test_page_faults_goes_on_without_a_contender_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = page_faults.take_turn

    def fail(turn: dict[str, Any]) -> dict[str, list[float]]:
        if turn["contender"] == "store":
            raise page_faults.TurnFailedError("its process ended with -9")
        return real(turn)

    monkeypatch.setattr(page_faults, "take_turn", fail)
    sizes = [*SIZES, "--directory", str(tmp_path), "--patterns", "uniform"]
    page_faults.main([*sizes, "--only", "direct reads", "store"])
    printed = capsys.readouterr().out
    assert "without store: its process ended with -9" in printed
    assert any(line.startswith("direct reads") for line in printed.splitlines())


def test_a_turn_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(page_faults.TurnFailedError, match="FileNotFoundError"):
        page_faults.take_turn(
            {
                "contender": "direct reads",
                "directory": str(tmp_path / "none"),
                "n_pages": 8,
                "pattern": None,
            }
        )


def test_page_faults_refuses_batches_that_no_cache_holds(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        page_faults.main(["--mib", "8", "--cache-mib", "1", "--directory", str(tmp_path)])


def test_help_names_every_contender(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        page_faults.main(["--help"])
    text = capsys.readouterr().out
    assert all(each.name in text for each in CONTENDERS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_the_same_for_every_contender(pattern: str) -> None:
    first = list(itertools.islice(batches(pattern, 500, 20, 60, seed=3), 30))
    again = list(itertools.islice(batches(pattern, 500, 20, 60, seed=3), 30))
    other = list(itertools.islice(batches(pattern, 500, 20, 60, seed=4), 30))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
        assert len(a) == 20 and a.min() >= 0 and a.max() < 500 and (np.diff(a) > 0).all()
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_zipf_has_popular_pages_and_sliding_a_window() -> None:
    counts = np.bincount(
        np.concatenate(list(itertools.islice(batches("zipf", 500, 20, 60, seed=1), 200))),
        minlength=500,
    )
    assert np.sort(counts)[-25:].sum() > 0.3 * counts.sum()
    window = next(batches("sliding", 500, 20, 60, seed=1))
    assert window.max() < 60


@pytest.mark.parametrize("points", ["random", "rays"])
def test_lookup_measures_every_contender(
    points: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--log2", "10", "--batches", "1", "--rounds", "1", "--points", points, "--json"]
    lookup.main([*sizes, "--directory", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert {"query", "kernel", "plain", "lines"} <= set(found["10"])
    assert all(rate > 0 for rates in found["10"].values() for rate in rates)
    assert list(tmp_path.iterdir()) == []


def test_lookup_prints_ratios_and_its_points_are_inside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--log2", "10", "--batches", "1", "--rounds", "1", "--dtype", "float16"]
    lookup.main([*sizes, "--threads", "2", "--directory", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("query") and " 1.00" in line for line in lines)
    for kind in ("random", "rays"):
        x = lookup.points_of(kind, 1000, 3)
        assert x.shape == (1000, 3) and x.dtype == np.float32
        assert x.min() >= 0 and x.max() <= 1
