"""What the memory gives: the probes read what they say, and the command prints it."""

import json

import numpy as np
import pytest

from dpnc.cli import app
from dpnc.kernels.probe import AHEAD, read_lines, read_stream
from dpnc.limits import memory_limits


@pytest.mark.parametrize("count", [0, 1, 5, AHEAD, AHEAD + 3, AHEAD + 4, 1000])
def test_each_line_is_read_once(count):
    rng = np.random.default_rng(count)
    values = rng.integers(0, 1000, 5000).astype(np.float32)
    places = rng.integers(0, 5000, 1500)
    # Whole numbers: the sum is exact in every order.
    assert read_lines(values, places, 300, 300 + count) == values[places[300 : 300 + count]].sum()


def test_a_stream_is_read_as_often_as_asked():
    words = np.random.default_rng(0).integers(0, 1 << 63, 999, np.uint64)
    for n_passes in (0, 1, 3):
        total = sum(int(word) ^ number for word in words[7:] for number in range(n_passes))
        assert read_stream(words, 7, 999, n_passes) % (1 << 64) == total % (1 << 64)


@pytest.mark.parametrize("threads", [1, 2])
def test_rates_are_positive_and_finite(threads):
    with memory_limits(1 << 20, threads) as (lines, stream):
        for measure in (lines, stream):
            assert 0 < measure() < 1e13


def test_the_command_measures_a_resident_field(capsys, tmp_path):
    command = ["bench", "lookup", "--log2", "9", "--log2", "10", "--rounds", "2", "--json"]
    command += ["--threads", "1", "--directory", str(tmp_path)]
    assert run(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dtype"] == "float16" and document["threads"] == 1
    assert [size["log2_rows_per_level"] for size in document["sizes"]] == [9, 10]
    for size in document["sizes"]:
        assert size["resident"] == 1.0
        rows_per_s = size["points_per_s"] * 128
        assert size["rows_per_line"] == pytest.approx(rows_per_s / size["lines_per_s"])
    assert list(tmp_path.iterdir()) == []
    assert run([*command, "--log2", "8"]) == 2


def test_the_command_prints_a_table(capsys):
    assert run(["bench", "lookup", "--log2", "9", "--rounds", "1", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "2^9" in printed and "GB/s" in printed and "float32" in printed


def run(arguments):
    with pytest.raises(SystemExit) as ended:
        app(arguments, prog_name="dpnc")
    return ended.value.code
