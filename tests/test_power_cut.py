"""After a power cut a store is the last acknowledged commit or the one in flight, whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiers.errors import NestedClaimError
from tiers.store import Store
from tiers.testing import (
    Fault,
    FaultDisk,
    PowerCut,
    RecoveryError,
    check_image,
    check_images,
    power_cut,
)
from tiers.testing.crash import record_seed
from tiers.testing.workload import Begins, Holds

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
N_IMAGES = 1500
SEED = 20


def test_every_image_is_a_committed_state_and_goes_on():
    violations = [str(found) for found in check_images(SEED, N_IMAGES * SCALE) if found is not None]
    assert violations == []


def test_an_image_cut_at_every_operation_of_one_run_is_a_committed_state():
    recording = record_seed(SEED)
    for k in range(len(recording.log.operations) + 1):
        check_image(recording, k, image=k)


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


def test_the_command_line_checks_images_and_counts_them():
    command = [sys.executable, "-m", "tiers.testing", "--images", "20", "--seed", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "20 images" in done.stdout and "0 violations" in done.stdout


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
