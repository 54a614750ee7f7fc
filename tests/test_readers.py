"""Readers beside a writer: they see one commit, whole, or are told that it is gone."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tiers import Store
from tiers.errors import (
    CorruptionError,
    SnapshotExpiredError,
    StoreFullError,
    StoreLockedError,
)
from tiers.memory import budget_min
from tiers.testing import FaultDisk

SECONDS = float(os.environ.get("DPNC_THREADS_SECONDS", "8"))
PATH = Path("/machine/store")
PAGE = 4096
N_PAGES = 80
BUDGET = budget_min(PAGE) + 30 * PAGE


@pytest.fixture
def disk():
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    return disk


def new_store(disk, path=PATH):
    store = Store.create(path, BUDGET, page_size=PAGE, disk=disk)
    store.create_space("a", dtype="uint8", row_width=PAGE, n_rows=N_PAGES)
    fill(store, 1)
    return store


def fill(store, value):
    space = store.space("a")
    for first in range(0, N_PAGES, 8):
        pages = np.arange(first, first + 8)
        with store.claim([(space, pages)], write=True) as claim:
            store.arena[claim.frames[0]] = value
    store.commit(meta={"value": value})


def assert_reads(store, value):
    space = store.space("a")
    for page in range(N_PAGES):
        with store.claim([(space, np.array([page]))]) as claim:
            assert (store.arena[claim.frames[0][0]] == value).all()


def reader_of(disk):
    return Store.open(PATH, BUDGET, read_only=True, disk=disk.process())


def test_a_reader_stays_at_its_commit_and_refreshes_to_the_newest(disk):
    with new_store(disk) as store, reader_of(disk) as reader:
        space = reader.space("a")
        for value in range(2, 30):
            fill(store, value)
            assert_reads(reader, value - 1)
            assert reader.refresh() == store.commit_number
            assert reader.meta == {"value": value}
            assert reader.space("a") is space
            assert_reads(reader, value)


def test_blocks_are_held_for_a_reader_and_used_again_when_it_has_gone(disk):
    with new_store(disk) as store:
        reader = reader_of(disk)
        for value in range(2, 12):
            fill(store, value)
        held = store.stats()["tiers"]["nvme"]["file_bytes"]
        assert held >= 10 * N_PAGES * PAGE
        assert_reads(reader, 1)
        reader.close()
        for value in range(12, 40):
            fill(store, value)
        # The first of these commits could not know yet that the reader has gone.
        assert store.stats()["tiers"]["nvme"]["file_bytes"] < held + 3 * N_PAGES * PAGE
        assert disk.list_directory(PATH / "readers") == []


def test_a_reader_that_dies_holds_nothing(disk):
    with new_store(disk) as store:
        process = disk.process()
        Store.open(PATH, BUDGET, read_only=True, disk=process)
        assert len(disk.list_directory(PATH / "readers")) == 1
        process.power_off()
        fill(store, 2)
        assert disk.list_directory(PATH / "readers") == []


def test_a_writer_that_opens_later_goes_on_without_readers_of_earlier_commits(disk):
    writer = disk.process()
    store = new_store(writer)
    old, new = reader_of(disk), None
    fill(store, 2)
    new = reader_of(disk)
    writer.power_off()
    with Store.open(PATH, BUDGET, disk=disk.process()) as store:
        for value in range(3, 9):
            fill(store, value)
        assert_reads(new, 2)
        with pytest.raises(SnapshotExpiredError, match="refresh"):
            assert_reads(old, 1)
        old.refresh()
        assert_reads(old, 8)
        store.check()
    old.close()
    new.close()


def test_a_writer_on_a_full_disk_goes_on_without_readers(disk):
    with new_store(disk) as store, reader_of(disk) as reader:
        disk.capacity_bytes = sum(disk.files().values()) + 4 * N_PAGES * PAGE
        for value in range(2, 30):
            fill(store, value)
        with pytest.raises(SnapshotExpiredError):
            assert_reads(reader, 1)
        disk.capacity_bytes = sum(disk.files().values())
        with pytest.raises(StoreFullError):
            for _ in range(2):
                space = store.create_space("b", dtype="uint8", row_width=PAGE, n_rows=900)
                for page in range(900):
                    with store.claim([(space, np.array([page]))], write=True):
                        pass
        store.abort()
        assert_reads(store, 29)


def test_damage_is_not_taken_for_expiry(disk):
    with new_store(disk) as store, reader_of(disk) as reader:
        for offset in range(0, disk.files()[PATH / "pages"], PAGE):
            disk.flip(PATH / "pages", offset)
        for reads in (reader, store):
            with pytest.raises(CorruptionError):
                for name in ("a",):
                    space = reads.space(name)
                    reads.claim([(space, np.arange(8))]).release()
                    reads.claim([(space, np.arange(8, 40))]).release()
                    reads.claim([(space, np.arange(40, 70))]).release()


def test_media_that_cannot_be_written_are_read_and_keep_writers_out(disk, monkeypatch):
    new_store(disk).close()

    def refuse(self, path, mode, *, direct):
        if mode != "read":
            raise OSError(30, "Read-only file system", str(path))
        return open_file(self, path, mode, direct=direct)

    open_file, make_directory = FaultDisk.open, FaultDisk.make_directory
    with monkeypatch.context() as patch:
        patch.setattr(FaultDisk, "open", refuse)
        patch.setattr(
            FaultDisk,
            "make_directory",
            lambda self, path: refuse(self, path, "create", direct=False),
        )
        reader = Store.open(PATH, BUDGET, read_only=True, disk=disk.process())
        assert_reads(reader, 1)
        assert reader.refresh() == reader.commit_number
    assert FaultDisk.make_directory is make_directory
    with pytest.raises(StoreLockedError):
        Store.open(PATH, BUDGET, disk=disk.process())
    reader.close()
    Store.open(PATH, BUDGET, disk=disk.process()).close()


def read_for_ever(path):
    """Read commit after commit; each must be whole. Runs in a process of its own."""
    n_reads = n_expired = 0
    with Store.open(path, BUDGET, read_only=True) as store:
        while True:
            value = store.meta["value"]
            try:
                for _ in range(2):
                    assert_reads(store, value % 251)
                n_reads += 1
            except SnapshotExpiredError:
                n_expired += 1
            store.refresh()
            assert store.meta["value"] >= value
            os.write(1, f"{n_reads} {n_expired}\n".encode())


@pytest.mark.timeout(120 + 4 * SECONDS)
def test_processes_read_beside_a_writer_that_is_killed_and_comes_back(tmp_path):
    path = tmp_path / "store"
    Store.create(path, BUDGET, page_size=PAGE).close()
    with Store.open(path, BUDGET) as store:
        store.create_space("a", dtype="uint8", row_width=PAGE, n_rows=N_PAGES)
        fill(store, 1)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, __file__]
    readers = [
        subprocess.Popen([*command, "read", path], stdout=subprocess.PIPE, env=environment)
        for _ in range(3)
    ]
    rng = np.random.default_rng(4)
    ends = time.monotonic() + SECONDS
    n_writers = 0
    while time.monotonic() < ends or n_writers < 3:
        with subprocess.Popen(
            [*command, "write", path], stdout=subprocess.PIPE, env=environment
        ) as writer:
            for _ in range(int(rng.integers(1, 30))):
                assert writer.stdout.readline(), "the writer failed on its own"
            writer.send_signal(signal.SIGKILL)
        n_writers += 1
    for reader in readers:
        assert reader.poll() is None, "a reader failed"
        reader.send_signal(signal.SIGKILL)
        lines = reader.stdout.read().splitlines()
        reader.stdout.close()
        reader.wait()
        assert lines and int(lines[-1].split()[0]) > 2
    with Store.open(path, BUDGET) as store:
        assert_reads(store, store.meta["value"] % 251)
        assert store.check()["blocks_lost"] == 0
        assert list((path / "readers").iterdir()) == []


def write_for_ever(path):
    with Store.open(path, BUDGET) as store:
        value = store.meta["value"]
        while True:
            value += 1
            space = store.space("a")
            for first in range(0, N_PAGES, 8):
                with store.claim([(space, np.arange(first, first + 8))], write=True) as claim:
                    store.arena[claim.frames[0]] = value % 251
            store.commit(meta={"value": value})
            os.write(1, b"committed\n")


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        {"read": read_for_ever, "write": write_for_ever}[sys.argv[1]](sys.argv[2])
