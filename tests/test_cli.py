"""The command line: a fit from start to picture, what it refuses, what Ctrl-C does."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dpnc import cli
from dpnc.image import load

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--levels", "6", "--log2-hashmap-size", "12", "--hidden", "8", "--tile", "16")
BUDGET = ("--budget", "8MiB")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_json(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def start(*arguments):
    """Start the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dpnc.cli", *(str(argument) for argument in arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, words):
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"the process ended without saying {words!r}")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture with an edge, a gradient and a texture."""
    down, across = np.mgrid[0:80, 0:96]
    red, green = across * 255 // 95, down * 255 // 79
    blue = 255 * ((across // 8 + down // 8) % 2)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def fitted(photo):
    store = photo.with_name("fitted.dpnc")
    return store, run_json("fit", photo, store, "--steps", 40, *SMALL, *BUDGET)


def test_a_fit_reports_its_step_and_digest(fitted):
    _, document = fitted
    assert document["step"] == 40
    assert not document["interrupted"]
    assert int(document["digest"], 16) >= 0
    assert document["stats"]["tiers"]["dram"]["peak_bytes"] <= 8 << 20


def test_a_rendered_picture_resembles_the_original(fitted, photo, tmp_path):
    store, _ = fitted
    document = run_json("render", store, tmp_path / "out.png", *BUDGET)
    assert (document["width"], document["height"]) == (96, 80)
    original, drawn = load(photo), load(tmp_path / "out.png")
    untrained_rms = np.sqrt(np.mean(original**2))
    assert np.sqrt(np.mean((drawn - original) ** 2)) < untrained_rms / 3


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--region", "0.5,0,1,0.5"], (48, 40)),
        (["--width", "192"], (192, 160)),
        (["--height", "40"], (48, 40)),
        (["--width", "7", "--height", "9"], (7, 9)),
        (["--region", "0,0,0.5,1", "--height", "40"], (24, 40)),
    ],
)
def test_a_picture_has_the_size_that_was_asked_for(fitted, tmp_path, options, size):
    store, _ = fitted
    run_json("render", store, tmp_path / "out.png", *options, *BUDGET)
    assert load(tmp_path / "out.png").shape == (size[1], size[0], 3)


def test_info_says_what_a_store_holds(fitted):
    store, _ = fitted
    document = run_json("info", store, *BUDGET)
    assert document["dtype"] == "float16"
    assert len(document["levels"]) == 6
    assert document["updates"] == 40
    assert document["meta"]["step"] == 40
    assert document["optimizer"]["learning_rate"] == 1e-2
    text = run("info", store, *BUDGET)
    assert text.exit_code == 0
    assert "2-D hash grid" in text.stdout


def test_a_resumed_fit_has_the_bits_of_one_that_never_stopped(fitted, photo, tmp_path):
    _, whole = fitted
    store = tmp_path / "parts.dpnc"
    run_json("fit", photo, store, "--steps", 13, *SMALL, *BUDGET)
    document = run_json("fit", photo, store, "--resume", "--steps", 40, "--budget", "9MiB")
    assert document["step"] == 40
    assert document["digest"] == whole["digest"]


def test_how_often_a_fit_commits_does_not_change_its_bits(fitted, photo, tmp_path):
    _, whole = fitted
    options = ("--steps", 40, "--commit-every", 7)
    document = run_json("fit", photo, tmp_path / "often.dpnc", *options, *SMALL, *BUDGET)
    assert document["digest"] == whole["digest"]


def test_ctrl_c_commits_and_the_fit_goes_on_with_the_same_bits(photo, tmp_path):
    store = tmp_path / "stopped.dpnc"
    options = ("--steps", 1_000_000, "--commit-every", 5, "--json")
    process = start("fit", photo, store, *options, *SMALL, *BUDGET)
    wait_for(process, "is committed")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED, stderr
    assert "dpnc fit --resume" in stderr.replace("\n", " ")
    document = json.loads(stdout)
    assert document["interrupted"]
    step = document["step"]
    assert run_json("info", store, *BUDGET)["meta"]["step"] == step
    resumed = run_json("fit", photo, store, "--resume", "--steps", step + 3, *BUDGET)
    whole = run_json("fit", photo, tmp_path / "whole.dpnc", "--steps", step + 3, *SMALL, *BUDGET)
    assert resumed["digest"] == whole["digest"]


def test_a_second_ctrl_c_leaves_a_commit_behind(photo, tmp_path):
    store = tmp_path / "twice.dpnc"
    options = ("--steps", 1_000_000, "--commit-every", 1)
    process = start("fit", photo, store, *options, *SMALL, *BUDGET)
    wait_for(process, "is committed")
    process.send_signal(signal.SIGINT)
    wait_for(process, "stopping after this step")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED, stderr
    assert "Traceback" not in stderr
    step = run_json("info", store, *BUDGET)["meta"]["step"]
    assert step >= 1
    assert run_json("fit", photo, store, "--resume", "--steps", step, *BUDGET)["step"] == step


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "{photo}.missing", "{new}"], "missing"),
        (["fit", "{store}", "{new}"], "no picture"),
        (["fit", "{photo}", "{store}"], "fitted.dpnc"),
        (["fit", "{photo}", "{new}", "--budget", "nonsense"], "nonsense"),
        (["fit", "{photo}", "{new}", "--budget", "1KiB"], "budget"),
        (["fit", "{photo}", "{new}", "--features", "3"], "n_features_per_level"),
        (["fit", "{photo}", "{new}", "--learning-rate", "nan"], "learning_rate"),
        (["fit", "{photo}", "{new}", "--resume"], "new.dpnc"),
        (["render", "{new}", "{out}"], "new.dpnc"),
        (["render", "{store}", "{out}.nothing"], "nothing"),
        (["info", "{new}"], "new.dpnc"),
        (["info", "{photo}"], "photo.png"),
        (["demo", "--image", "{photo}.missing", "--out", "{out}"], "missing"),
    ],
)
def test_bad_input_is_refused_by_name_and_leaves_nothing(fitted, photo, tmp_path, arguments, words):
    store, _ = fitted
    new, out = tmp_path / "new.dpnc", tmp_path / "out.png"
    filled = [part.format(photo=photo, store=store, new=new, out=out) for part in arguments]
    result = run(*filled)
    assert result.exit_code == cli.EXIT_ERROR, result.output
    assert "refused" in result.stderr
    assert words in result.stderr.replace("\n", "")
    assert result.stdout == ""
    assert not new.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["fit"],
        ["fit", "a.png", "b.dpnc", "--steps", "-1"],
        ["fit", "a.png", "b.dpnc", "--layout", "spiral"],
        ["fit", "a.png", "b.dpnc", "--resume", "--levels", "4"],
        ["render", "b.dpnc", "out.png", "--region", "0,0,1"],
        ["render", "b.dpnc", "out.png", "--region", "a,b,c,d"],
        ["render", "b.dpnc", "out.png", "--region", "0,0,2,1"],
        ["render", "b.dpnc", "out.png", "--width", "0"],
        ["demo", "--steps", "0"],
    ],
)
def test_wrong_usage_is_said_before_anything_is_done(arguments):
    result = run(*arguments)
    assert result.exit_code == cli.EXIT_USAGE
    assert result.stdout == ""


def test_a_flipped_byte_is_corruption_and_not_a_picture(photo, tmp_path):
    store, out = tmp_path / "flipped.dpnc", tmp_path / "out.png"
    run_json("fit", photo, store, "--steps", 2, *SMALL, *BUDGET)
    largest = max((path for path in store.rglob("*") if path.is_file()), key=size_bytes)
    content = bytearray(largest.read_bytes())
    for position in range(len(content) // 2, len(content), 4096):
        content[position] ^= 1
    largest.write_bytes(content)
    result = run("render", store, out, *BUDGET)
    assert result.exit_code == cli.EXIT_NOT_INTACT, result.output
    assert "corrupt" in result.stderr
    assert not out.exists()


def size_bytes(path):
    return path.stat().st_size


def test_another_picture_does_not_resume_a_fit(fitted, tmp_path):
    store, _ = fitted
    Image.new("RGB", (96, 80)).save(tmp_path / "black.png")
    result = run("fit", tmp_path / "black.png", store, "--resume", *BUDGET)
    assert result.exit_code == cli.EXIT_ERROR
    assert "another picture" in result.stderr


def test_brackets_in_a_path_are_no_markup(tmp_path):
    result = run("info", tmp_path / "[red]a.dpnc")
    assert "[red]a.dpnc" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("command", ["demo", "fit", "render", "info", "warmup"])
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"dpnc {command}" in result.stdout
    assert "Example" in result.stdout


def test_exit_codes_are_documented():
    text = " ".join(run("--help").stdout.split())
    for code in (cli.EXIT_ERROR, cli.EXIT_USAGE, cli.EXIT_NOT_INTACT, cli.EXIT_INTERRUPTED):
        assert f" {code} " in text


def test_the_version_is_told():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("dpnc 0.")
