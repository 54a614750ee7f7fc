"""Benchmarks run, with small parameters, so that they do not rot; nothing is timed here."""

from __future__ import annotations

import json

import pytest

from bench import page_faults


def test_page_faults_measures_every_contender(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--mib", "16", "--batch", "8", "--batches", "2", "--rounds", "1"]
    page_faults.main([*sizes, "--directory", str(tmp_path), "--json"])
    rates = json.loads(capsys.readouterr().out)["pages_per_second"]
    assert set(rates) == {"direct reads", "store", "memmap, WILLNEED", "memmap, RANDOM"}
    assert all(rate > 0 for rate in rates.values())
    page_faults.main([*sizes, "--directory", str(tmp_path)])
    assert "of ceiling" in capsys.readouterr().out
