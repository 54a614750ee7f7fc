"""After a power cut a store is the last acknowledged commit or the one in flight, whole."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from test_planted_bugs import forget_root_sync, forget_slot_sync

from tiers.errors import NestedClaimError
from tiers.store import Store
from tiers.testing import (
    Fault,
    FaultDisk,
    Outcome,
    PowerCut,
    RecoveryCheck,
    RecoveryError,
    check_image,
    check_images,
    power_cut,
)
from tiers.testing.__main__ import main
from tiers.testing.crash import IMAGES_PER_RECORDING, record_seed
from tiers.testing.footprint import KnownImages
from tiers.testing.processes import in_processes
from tiers.testing.workload import Begins, Holds

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
N_IMAGES = 20_000
SEED = 20
JOBS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(1200 * SCALE)
def test_every_image_is_a_committed_state_and_goes_on():
    outcomes = list(check_images(SEED, N_IMAGES * SCALE, JOBS))
    violations = [str(outcome.violation) for outcome in outcomes if outcome.violation is not None]
    assert not violations, "\n".join(violations)
    assert len(outcomes) == N_IMAGES * SCALE
    assert sum(outcome.is_distinct for outcome in outcomes) > len(outcomes) // 20


@pytest.mark.parametrize("plant", [forget_slot_sync, forget_root_sync])
def test_as_many_images_see_a_sync_that_is_left_out(monkeypatch, plant):
    plant(monkeypatch)
    outcomes = check_images(SEED, N_IMAGES)
    violation = next(outcome.violation for outcome in outcomes if outcome.violation is not None)
    assert violation is not None
    with pytest.raises(RecoveryError, match=re.escape(violation.reason)):
        check_image(record_seed(violation.seed), violation.k, violation.image)


@pytest.mark.parametrize("seed", range(SEED, SEED + 4))
def test_an_image_that_is_not_opened_reads_as_one_that_was(monkeypatch, seed):
    """Opened nevertheless, it gives the store the same bytes in the same order."""
    recording = record_seed(seed)
    check = RecoveryCheck(recording)
    rng = np.random.default_rng(seed)
    images = rng.integers((len(recording.log.operations) + 1, 1 << 32), size=(150, 2)).tolist()
    outcomes = [check(k, image) for k, image in images]
    answers = []
    read_batch, size = FaultDisk.read_batch, FaultDisk.size

    def watched_read_batch(self, file, offsets, buffers, *, in_flight=1):
        read_batch(self, file, offsets, buffers, in_flight=in_flight)
        contents = [buffer.tobytes() for buffer in buffers]
        answers.append((str(file.path), tuple(int(offset) for offset in offsets), *contents))

    def watched_size(self, file):
        answers.append((str(file.path), size(self, file)))
        return answers[-1][1]

    monkeypatch.setattr(FaultDisk, "read_batch", watched_read_batch)
    monkeypatch.setattr(FaultDisk, "size", watched_size)
    # The one thing that is drawn, where a store is created anew.
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(int=7))
    known, known_alike = set(), set()
    for (k, image), outcome in zip(images, outcomes, strict=True):
        cut = check._cuts.choose(k, np.random.default_rng(image))
        for number in recording.allowed(k) or [None]:
            disk = check._cuts.image(cut)
            answers[:] = [str(disk.log.base.directories)]
            if number is None:
                check._check_creation(disk)
                break
            with Store.open("/machine/store", "1536KiB", disk=disk) as store:
                if recording.states[number].difference(store) is None:
                    break
        # Where a commit changed nothing, two numbers stand for one state.
        first = None if number is None else recording.states.index(recording.states[number])
        course, alike = hash((number, *answers)), hash((first, *answers))
        assert course not in known if outcome.is_distinct else alike in known_alike
        known.add(course)
        known_alike.add(alike)
    assert 0 < sum(outcome.is_distinct for outcome in outcomes) < 100
    assert not all(outcome.is_opened for outcome in outcomes)


def test_an_image_is_opened_that_differs_from_a_known_one_in_anything_that_is_read():
    """One byte of what was read, one name, or one finding that is not allowed any more."""
    recording = record_seed(SEED)
    k = len(recording.log.operations)
    number = recording.allowed(k)[0]
    check = RecoveryCheck(recording)
    cut = check._cuts.choose(k, np.random.default_rng(0))
    remains = check._cuts.remains(cut)
    disk = remains.disk()
    looks = disk.watch()
    with Store.open("/machine/store", "1536KiB", disk=disk) as store:
        assert recording.states[number].difference(store) is None
    known = KnownImages()
    known.add(remains, looks, number)
    assert known.findings(remains, [number, number + 1]) == {number}
    assert not known.findings(remains, [number + 1])
    seen = {(inode, at) for inode, numbers in looks for at in numbers if remains.has_file(inode)}
    assert len(seen) > 10
    for place in seen:
        other = check._cuts.remains(cut)
        content = other.chunk(*place)
        other._touched.setdefault(place[0], set()).add(place[1])
        other._chunks[place] = bytes([content[0] ^ 1]) + content[1:]
        assert not known.findings(other, [number])
    other = check._cuts.remains(cut)
    other.directories = {**other.directories, max(other.directories): {"one more": 99}}
    assert not known.findings(other, [number])
    for inode in {inode for inode, _ in seen}:
        other = check._cuts.remains(cut)
        other._changes[inode] = []
        other._sizes_bytes[inode] = other.size_bytes(inode) + 4096
        assert not known.findings(other, [number])


def test_an_image_cut_at_every_operation_of_one_run_is_a_committed_state():
    check = RecoveryCheck(record_seed(SEED))
    for k in range(len(check.recording.log.operations) + 1):
        check(k, image=k)


def test_a_recording_has_seen_what_it_is_there_for():
    """Across a few seeds: many commits, and some that were cut off."""
    recordings = [record_seed(seed) for seed in range(SEED, SEED + 8)]
    in_flight = 0
    for recording in recordings:
        marks = recording.log.marks(len(recording.log.operations))
        begun = {mark.number for mark in marks if isinstance(mark, Begins)}
        held = {mark.number for mark in marks if isinstance(mark, Holds)}
        assert len(recording.states) > 4 and held <= begun | {0}
        in_flight += len(begun - held)
    assert in_flight > 0, "no commit was ever cut off"


def test_a_violation_names_what_makes_it_again(monkeypatch):
    recording = record_seed(SEED)
    k = len(recording.log.operations)
    recording.states[recording.allowed(k)[0]].meta = {"never": "committed"}
    with pytest.raises(RecoveryError, match=f"seed {SEED}, k {k}, image 3: .*meta"):
        check_image(recording, k, image=3)


def test_a_violation_prints_the_command_that_shows_it_again():
    violation = RecoveryError(7, 8, 9, "page 3 has other bytes")
    command = str(violation).splitlines()[-1].split()
    assert command[:4] == ["again:", "python", "-m", "tiers.testing"]
    done = command_line(*command[4:])
    assert done.returncode == 0, done.stderr
    assert "came back as it must" in done.stdout
    assert str(pickle.loads(pickle.dumps(violation))) == str(violation)


def command_line(*arguments):
    command = [sys.executable, "-m", "tiers.testing", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_line_checks_images_and_counts_them():
    done = command_line("--images", "20", "--seed", "3")
    assert done.returncode == 0, done.stderr
    summary = done.stdout.splitlines()[-1]
    found = re.fullmatch(
        r"20 images, (\d+) distinct, (\d+) opened, 0 violations, \d+ images/s, seed 3, \d+ jobs",
        summary,
    )
    assert found and 0 < int(found[1]) <= int(found[2]) <= 20, summary


def test_into_a_file_the_command_line_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("tiers.testing.__main__.SECONDS_A_LINE", 0.0)
    assert main(["--images", "5", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    so_far = [line for line in lines if line.endswith("0 violations so far")]
    assert [int(line.split()[0]) for line in so_far] == [1, 2, 3, 4, 5]


def test_the_command_line_checks_for_some_minutes():
    done = command_line("--minutes", "0.001", "--seed", "3", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{IMAGES_PER_RECORDING} images, ")


@pytest.mark.parametrize(
    "wrong",
    [
        *[("--images", "-1"), ("--jobs", "0"), ("--images", "many"), ("--minutes", "0")],
        *[("--minutes", "nan"), ("--images", "1", "--minutes", "1")],
    ],
)
def test_the_command_line_refuses_what_makes_no_sense(wrong):
    done = command_line(*wrong)
    assert done.returncode == 2 and wrong[0] in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_ends_every_process_and_says_how_far_it_came():
    command = [sys.executable, "-m", "tiers.testing", "--images", "1000000", "--jobs", "2"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            while len(descendants(running.pid)) < 2:
                assert running.poll() is None
                time.sleep(0.05)
            started = descendants(running.pid)
            os.killpg(running.pid, signal.SIGINT)
            printed, _ = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130, printed
    assert re.search(r"\d+ images, .* 0 violations, .*interrupted", printed), printed
    assert "Traceback" not in printed
    # The last to go is a helper of multiprocessing that waits for the pipe to close.
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        time.sleep(0.05)


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [other for child in found for other in descendants(child)]


def outcome_of(part, n_outcomes):
    for number in range(n_outcomes):
        yield part, number, os.getpid()


def test_outcomes_are_the_same_in_the_same_order_whatever_the_number_of_processes():
    parts = [(part, 1 + part % 3) for part in range(9)]
    expected = [(part, number) for part, n in parts for number in range(n)]
    for jobs in (1, 3):
        outcomes = list(in_processes(outcome_of, parts, jobs))
        assert [outcome[:2] for outcome in outcomes] == expected
        assert os.getpid() not in {outcome[2] for outcome in outcomes}


def test_images_are_the_same_whatever_the_number_of_processes(monkeypatch):
    """What a process finds in its part is what this one finds there, violations included."""
    n_images = IMAGES_PER_RECORDING + 20
    monkeypatch.setattr("tiers.testing.crash.in_processes", in_this_process)
    seen = []
    monkeypatch.setattr(
        RecoveryCheck,
        "__call__",
        lambda self, k, image: seen.append((self.recording.seed, k, image)),
    )
    for jobs in (1, 2):
        assert list(check_images(SEED, n_images, jobs)) == [None] * n_images
    assert seen[:n_images] == seen[n_images:] and len(set(seen)) == n_images


def in_this_process(work, parts, jobs):
    for part in parts:
        yield from work(*part)


def failing(part):
    violation = RecoveryError(part, 2, 3, "not as it must be")
    yield Outcome(is_distinct=True, is_opened=True, violation=violation)


def test_a_violation_comes_through_from_another_process():
    (outcome,) = in_processes(failing, [(1,)], 2)
    found = outcome.violation
    assert isinstance(found, RecoveryError) and found.seed == 1 and found.k == 2
    assert "--replay 1 2 3" in str(found)


def test_without_a_number_images_go_on_until_nobody_asks_for_more(monkeypatch):
    monkeypatch.setattr("tiers.testing.crash.in_processes", in_this_process)
    monkeypatch.setattr(RecoveryCheck, "__call__", lambda self, k, image: self.recording.seed)
    for jobs in (1, 2):
        images = check_images(SEED, None, jobs)
        seeds = [next(images) for _ in range(2 * IMAGES_PER_RECORDING + 1)]
        assert seeds[::IMAGES_PER_RECORDING] == [SEED, SEED + 1, SEED + 2]


def test_no_process_is_left_when_the_reader_of_outcomes_stops():
    outcomes = in_processes(outcome_of, [(part, 1000) for part in range(50)], 2)
    pid = next(outcomes)[2]
    outcomes.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("n_images", "jobs"), [(-1, 1), (5, 0)])
def test_a_number_of_images_or_processes_that_makes_no_sense_is_refused(n_images, jobs):
    with pytest.raises(ValueError, match=str(min(n_images, jobs))):
        next(check_images(SEED, n_images, jobs))


def small_store(disk, path=Path("/store")):
    store = Store.create(path, "1MiB", page_size=4096, disk=disk)
    space = store.create_space("a", dtype="uint8", row_width=4096, n_rows=8)
    return store, space


def write(store, space, value):
    pages = np.arange(space.n_pages)
    with store.claim([(space, pages)], write=True) as claim:
        store.arena[claim.frames[0]] = value


@pytest.mark.parametrize("accident", ["kill", "failed sync"])
def test_a_root_that_an_open_showed_is_durable_before_anything_is_built_on_it(accident):
    """The page cache shows a root that the device may lack: its writer died, or a sync failed."""
    disk = FaultDisk()
    store, space = small_store(disk)
    write(store, space, 1)
    store.commit(meta={"value": 1})
    write(store, space, 2)
    if accident == "kill":
        changes = len(disk.log.operations)
        trial = FaultDisk(disk.twin().log.base)
        other = Store.open("/store", "1MiB", disk=trial)
        before = len(trial.log.operations)
        write(other, other.space("a"), 2)
        other.commit(meta={"value": 2})
        assert len(disk.log.operations) == changes
        disk.cut_after(len(trial.log.operations) - before - 2)
        with pytest.raises(PowerCut):
            store.commit(meta={"value": 2})
        disk.power_off()
    else:
        disk.inject(Fault(at=2, kinds=("sync",)))
        with pytest.raises(Exception, match=r"refuses|failed"):
            store.commit(meta={"value": 2})
        store.close()
    store = Store.open("/store", "1MiB", disk=disk)
    assert store.meta == {"value": 2}, "the accident happened between the root's write and its sync"
    write(store, store.space("a"), 3)
    with pytest.raises(PowerCut):
        disk.cut_after(0)
        store.commit(meta={"value": 3})
    for seed in range(100):
        image = power_cut(disk.log, len(disk.log.operations), np.random.default_rng(seed))
        with Store.open("/store", "1MiB", disk=image) as found:
            assert found.meta == {"value": 2}
            found.check()


def test_a_space_made_on_a_disk_that_fills_up_can_be_committed():
    """What `create_space` and write claims were granted, a commit never refuses."""
    disk = FaultDisk()
    store = Store.create("/store", "4MiB", page_size=16384, disk=disk)
    store.create_space("a", dtype="float32", row_width=3, n_rows=5000)
    disk.capacity_bytes = sum(disk.files().values())
    store.commit()


@pytest.mark.parametrize("action", ["commit", "abort"])
def test_a_thread_cannot_end_a_transaction_under_its_own_write_claim(action):
    """It would wait for itself, or what it writes next would belong to no transaction."""
    store, space = small_store(FaultDisk())
    with store.claim([(space, np.arange(2))], write=True), pytest.raises(NestedClaimError):
        getattr(store, action)()
    getattr(store, action)()
    store.check()
