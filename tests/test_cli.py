"""The command line: a fit from start to picture, what it refuses, what Ctrl-C does."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from typer.testing import CliRunner

import dpnc
from dpnc import cli
from dpnc.image import load
from tiers import Constant, Store, Uniform

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


COMMANDS = [
    *("demo", "fit", "render", "warmup", "info", "check", "scrub", "compact", "backup", "salvage"),
    *("export", "snapshot", "snapshot list", "snapshot take", "snapshot drop", "snapshot rollback"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"dpnc {command}" in result.stdout
    assert "Example" in result.stdout


def test_every_command_is_listed():
    listed = run("--help").stdout + run("snapshot", "--help").stdout
    for command in COMMANDS:
        assert f"│ {command.split()[-1]} " in listed


def test_exit_codes_are_documented():
    text = " ".join(run("--help").stdout.split())
    for code in (cli.EXIT_ERROR, cli.EXIT_USAGE, cli.EXIT_NOT_INTACT, cli.EXIT_INTERRUPTED):
        assert f" {code} " in text


def test_the_version_is_told():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("dpnc 0.")


# Stores


@pytest.fixture
def store(tmp_path):
    """A store without a field: three commits, the second of which has a name."""
    path = tmp_path / "plain.dpnc"
    with Store.create(path, "4MiB", page_size=4096) as made:
        made.create_space("a", dtype="uint16", row_width=2, n_rows=50_000, initial=Constant(3))
        made.create_space("wide", dtype="float32", row_width=8, n_rows=1 << 50)
        write(made, "a", range(10), 1)
        made.commit(attributes={"of": "the tests"}, meta={"step": 1})
        made.snapshots.take("before")
        write(made, "a", range(5, 15), 2)
        write(made, "wide", [0, 1 << 40], 5)
        made.commit(meta={"step": 2})
    return path


def write(store, name, pages, value):
    space = store.space(name)
    for page in pages:
        with store.claim([(space, np.array([page], np.int64))], write=True) as claim:
            store.arena[claim.frames[0]] = value


def first_bytes(path, name, pages, **options):
    """Return the first byte of pages as a reader sees them."""
    with Store.open(path, "4MiB", read_only=True, **options) as opened:
        found = []
        for page in pages:
            with opened.claim([(opened.space(name), np.array([page]))]) as claim:
                found.append(int(opened.arena[claim.frames[0][0], 0]))
        return found


def damage(path, value):
    """Change a byte of the one page that is filled with `value`."""
    content = (path / "pages").read_bytes()
    at = content.index(bytes([value]) * 4096)
    (path / "pages").write_bytes(content[:at] + b"!" + content[at + 1 :])


def test_info_works_on_a_store_without_a_field(store):
    document = run_json("info", store)
    assert document["snapshots"] == [{"name": "before", "commit": 2}]
    spaces = {space["name"]: space for space in document["spaces"]}
    assert spaces["a"]["pages_stored"] == 15
    assert spaces["wide"]["pages_stored"] == 2
    assert document["meta"] == {"step": 2}
    assert "levels" not in document
    text = run("info", store)
    assert text.exit_code == 0
    for words in ("without a field", "wide", "before", "step 2", "nvme"):
        assert words in text.stdout


def test_info_shows_the_store_even_if_its_field_is_of_another_version(store):
    with Store.open(store, "4MiB") as opened:
        opened.commit(attributes={"field": {"format": 99}})
    assert "99" in run_json("info", store)["field_error"]
    assert "cannot be read" in run("info", store).stdout


def test_a_field_has_snapshots_and_spaces_in_its_info(fitted):
    path, _ = fitted
    document = run_json("info", path, *BUDGET)
    assert {space["name"] for space in document["spaces"]} >= {"features", "head"}
    assert document["snapshots"] == []
    with dpnc.open(path, budget="8MiB", read_only=True) as field:
        assert document["n_params"] == field.encoding.n_params


def test_snapshots_are_taken_listed_rolled_back_to_and_dropped(store):
    assert run_json("snapshot", "take", store, "after")["name"] == "after"
    listed = run_json("snapshot", "list", store)["snapshots"]
    assert [one["name"] for one in listed] == ["before", "after"]
    assert "after" in run("snapshot", "list", store).stdout
    refused = run("snapshot", "rollback", store, "before")
    assert refused.exit_code == cli.EXIT_ERROR
    assert "'after'" in refused.stderr
    assert first_bytes(store, "a", [4, 5, 14]) == [1, 2, 2]
    run_json("snapshot", "rollback", store, "before", "--drop-newer")
    assert first_bytes(store, "a", [4, 5, 14]) == [1, 1, 3]
    assert run_json("snapshot", "drop", store, "before")["snapshots"] == []
    assert "no snapshots" in run("snapshot", "list", store).stdout
    assert run_json("check", store)["blocks_lost"] == 0


def test_a_sound_store_is_checked_and_scrubbed_beside_its_writer(store):
    with Store.open(store, "4MiB") as writer:
        write(writer, "a", range(40), 9)
        assert run_json("check", store)["pages"] == 22
        document = run_json("scrub", store)
        assert document["damaged"] == []
        assert document["n_pages"] == 22
        assert "sound" in run("check", store).stdout
        assert "everything is what was written" in run("scrub", store).stdout


def test_a_damaged_page_is_found_named_and_salvaged_around(store, tmp_path):
    with Store.open(store, "4MiB") as opened:
        write(opened, "a", [12], 77)
        opened.commit()
    damage(store, 77)
    checked = run("check", store)
    assert checked.exit_code == cli.EXIT_NOT_INTACT
    assert "page 12" in checked.stderr and checked.stdout == ""
    scrubbed = run("scrub", store, "--json")
    assert scrubbed.exit_code == cli.EXIT_NOT_INTACT
    (found,) = json.loads(scrubbed.stdout)["damaged"]
    assert (found["tree"], found["first_page"], found["stop_page"]) == ("a", 12, 13)
    assert "page 12" in run("scrub", store).stdout
    for command in ("backup", "export"):
        refused = run(command, store, tmp_path / command)
        assert refused.exit_code == cli.EXIT_NOT_INTACT
        assert "corrupt" in refused.stderr
    salvaged = run("salvage", store, tmp_path / "found.dpnc", "--json")
    assert salvaged.exit_code == cli.EXIT_NOT_INTACT, "something was lost"
    assert json.loads(salvaged.stdout)["damaged"] == {"a": [12]}
    assert "page 12" not in run("check", tmp_path / "found.dpnc").output
    assert "(12)" in run("salvage", store, tmp_path / "again.dpnc").stdout
    assert first_bytes(tmp_path / "found.dpnc", "a", [4, 12, 13]) == [1, 3, 2]


def test_books_that_do_not_add_up_are_not_intact(store, monkeypatch):
    def wrong(self):
        raise AssertionError("a frame is lost")

    monkeypatch.setattr(Store, "check", wrong)
    result = run("check", store)
    assert result.exit_code == cli.EXIT_NOT_INTACT
    assert "a frame is lost" in result.stderr


def test_a_salvage_that_loses_nothing_is_ok(store, tmp_path):
    document = run_json("salvage", store, tmp_path / "found.dpnc")
    assert (document["n_pages"], document["damaged"]) == (17, {})
    assert run("salvage", store, tmp_path / "again.dpnc").exit_code == 0


def test_a_backup_is_a_store_and_of_a_snapshot_what_was_then(store, tmp_path):
    now, then = tmp_path / "now.dpnc", tmp_path / "then.dpnc"
    with Store.open(store, "4MiB") as writer:
        write(writer, "a", range(40), 9)
        assert run_json("backup", store, now)["pages"] == 17
        assert run_json("backup", store, then, "--snapshot", "before")["pages"] == 10
    assert first_bytes(now, "a", [4, 5, 14]) == [1, 2, 2]
    assert first_bytes(then, "a", [4, 5, 14]) == [1, 1, 3]
    assert "17 pages" in run("backup", store, tmp_path / "third.dpnc").stdout


def test_an_export_is_read_by_zarr(store, tmp_path):
    document = run_json("export", store, tmp_path / "all.zarr")
    assert document["arrays"] == {"a": "a", "wide": "wide"}
    group = zarr.open_group(tmp_path / "all.zarr", mode="r")
    assert dict(group.attrs) == {"of": "the tests"}
    assert group["a"].shape == (50_000, 2)
    options = ("--space", "a", "--snapshot", "before")
    assert "a; 1 chunks" in run("export", store, tmp_path / "then.zarr", *options).stdout
    then = zarr.open_group(tmp_path / "then.zarr", mode="r")
    assert list(then) == ["a"]
    assert (then["a"][5 * 1024] == 257).all()
    assert (group["a"][5 * 1024] == 514).all()


def test_random_rows_are_exported_up_to_a_bound(tmp_path):
    path = tmp_path / "u.dpnc"
    with Store.create(path, "4MiB") as made:
        made.create_space(
            "u", dtype="float32", row_width=4, n_rows=100_000, initial=Uniform(0.0, 1.0)
        )
        made.commit()
    refused = run("export", path, tmp_path / "u.zarr", "--materialised-max", "1MiB")
    assert refused.exit_code == cli.EXIT_ERROR
    assert "1,600,000 bytes" in refused.stderr
    assert run("export", path, tmp_path / "u.zarr").exit_code == 0


def test_a_compacted_store_is_smaller_and_the_same(store):
    with Store.open(store, "4MiB") as opened:
        write(opened, "a", range(40), 9)
        write(opened, "wide", range(300), 9)
        opened.commit()
        opened.snapshots.drop("before")
        opened.discard(opened.space("wide"), 0, 300)
        opened.commit()
    size_bytes = (store / "pages").stat().st_size
    document = run_json("compact", store)
    assert document["file_bytes"] < document["file_bytes_before"]
    assert (store / "pages").stat().st_size < size_bytes
    assert first_bytes(store, "a", [0, 39]) == [9, 9]
    assert first_bytes(store, "wide", [0, 1 << 40]) == [0, 5]
    assert run("compact", store).exit_code == 0
    assert run("check", store).exit_code == 0


WRITING = [["compact", "{store}"], ["salvage", "{store}", "{new}"]]
WRITING += [["snapshot", how, "{store}", "before"] for how in ("take", "drop", "rollback")]


@pytest.mark.parametrize("arguments", WRITING)
def test_a_store_that_is_being_written_is_locked(store, tmp_path, arguments):
    with Store.open(store, "4MiB"):
        result = run(*(part.format(store=store, new=tmp_path / "new") for part in arguments))
    assert result.exit_code == cli.EXIT_ERROR
    assert "open elsewhere" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "{new}"], "new.dpnc"),
        (["check", "{new}"], "new.dpnc"),
        (["scrub", "{new}"], "new.dpnc"),
        (["compact", "{new}"], "new.dpnc"),
        (["backup", "{new}", "{out}"], "new.dpnc"),
        (["backup", "{store}", "{store}"], "plain.dpnc"),
        (["backup", "{store}", "{out}/deep/er"], "out/deep does not exist"),
        (["backup", "{store}", "{out}", "--snapshot", "later"], "'before'"),
        (["backup", "{store}", "{out}", "--budget", "64KiB"], "budget"),
        (["salvage", "{new}", "{out}"], "new.dpnc"),
        (["salvage", "{store}", "{store}"], "plain.dpnc"),
        (["export", "{new}", "{out}"], "new.dpnc"),
        (["export", "{store}", "{store}"], "plain.dpnc"),
        (["export", "{store}", "{out}", "--space", "b"], "'a', 'wide'"),
        (["export", "{store}", "{out}", "--snapshot", "later"], "'before'"),
        (["export", "{store}", "{out}", "--materialised-max", "many"], "'many'"),
        (["snapshot", "list", "{new}"], "new.dpnc"),
        (["snapshot", "take", "{store}", "before"], "'before'"),
        (["snapshot", "take", "{store}", ""], "1 to 200 characters"),
        (["snapshot", "drop", "{store}", "later"], "'before'"),
        (["snapshot", "rollback", "{store}", "later"], "'before'"),
        (["check", "{store}", "--budget", "1KiB"], "1024"),
        (["compact", "{store}", "--budget", "much"], "'much'"),
    ],
)
def test_wrong_names_and_budgets_are_refused_and_change_nothing(store, tmp_path, arguments, words):
    before = (store / "pages").read_bytes()
    new, out = tmp_path / "new.dpnc", tmp_path / "out"
    result = run(*(part.format(store=store, new=new, out=out) for part in arguments))
    assert result.exit_code == cli.EXIT_ERROR, result.output
    assert "refused" in result.stderr
    assert words in result.stderr.replace("\n", "")
    assert result.stdout == ""
    assert not new.exists() and not out.exists()
    assert (store / "pages").read_bytes() == before
    assert run("check", store).exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [["check"], ["snapshot", "take", "x.dpnc"], ["backup", "x.dpnc"], ["snapshot", "undo", "x"]],
)
def test_missing_arguments_are_wrong_usage(arguments):
    result = run(*arguments)
    assert result.exit_code == cli.EXIT_USAGE
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["backup", "export", "compact"])
def test_ctrl_c_leaves_the_store_at_a_commit_and_nothing_half_done(store, tmp_path, command):
    with Store.open(store, "4MiB") as opened:
        for step in range(6):
            write(opened, "a", range(40), step)
            write(opened, "wide", range(0, 300_000, 200), step)
            opened.commit()
        opened.discard(opened.space("wide"), 0, 150_000)
        opened.commit()
    target = tmp_path / "target"
    arguments = [] if command == "compact" else [target]
    interrupted = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, command, str(store), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert interrupted.returncode == cli.EXIT_INTERRUPTED, interrupted.stderr
    assert "Traceback" not in interrupted.stderr
    assert "what was committed is kept" in interrupted.stderr
    assert interrupted.stdout == ""
    assert run("check", store).exit_code == 0
    assert first_bytes(store, "a", [0, 39]) == [5, 5]
    if arguments:
        assert run("check", target).exit_code == cli.EXIT_ERROR
    assert run(command, store, *arguments).exit_code == 0


INTERRUPTED = """
import os, signal, sys
import dpnc.cli.app
from dpnc.cli import main
from rich.progress import Progress

update = Progress.update

def interrupt(self, *arguments, **options):
    update(self, *arguments, **options)
    os.kill(os.getpid(), signal.SIGINT)

Progress.update = interrupt
main()
"""


def test_the_default_budgets_hold_a_store_of_the_largest_pages(tmp_path):
    path = tmp_path / "large.dpnc"
    with Store.create(path, "16MiB", page_size=1 << 20) as made:
        made.create_space("a", dtype="uint8", row_width=1 << 20, n_rows=40)
        write(made, "a", range(3), 1)
        made.commit()
    for arguments in (["info"], ["check"], ["scrub"], ["compact"], ["snapshot", "list"]):
        assert run(*arguments, path).exit_code == 0
    assert run("snapshot", "take", path, "now").exit_code == 0
    for command in ("backup", "salvage", "export"):
        assert run(command, path, tmp_path / command).exit_code == 0
