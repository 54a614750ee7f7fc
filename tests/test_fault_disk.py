"""A fault disk answers as the operating system does, to each process of a machine."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fault_disks import PLACE, aligned, new_disk, new_file, page, read
from hypothesis import given
from hypothesis import strategies as st

from tiers.disk import OsDisk
from tiers.errors import StoreLockedError
from tiers.testing import Fault, FaultDisk, PowerCut

NAMES = ("a", "b", "d", "d/a", "d/b", "e")
LOCKS = ("lock", "d/lock", "x/lock", "a")

step = st.one_of(
    st.tuples(st.just("make_directory"), st.sampled_from(NAMES)),
    st.tuples(st.just("list_directory"), st.sampled_from((".", *NAMES))),
    st.tuples(st.just("exists"), st.sampled_from(NAMES)),
    st.tuples(st.just("open"), st.sampled_from(NAMES), st.sampled_from(("create", "write"))),
    st.tuples(st.just("reopen_to_read"), st.integers(0, 3)),
    st.tuples(st.just("size"), st.integers(0, 3)),
    st.tuples(st.just("read"), st.integers(0, 3), st.integers(0, 9000), st.integers(1, 9000)),
    st.tuples(
        st.just("write"),
        st.integers(0, 3),
        st.integers(0, 9000),
        st.integers(1, 9000),
        st.integers(0, 255),
    ),
    st.tuples(st.just("allocate"), st.integers(0, 3), st.integers(1, 20000)),
    st.tuples(st.just("truncate"), st.integers(0, 3), st.integers(0, 20000)),
    st.tuples(st.just("sync"), st.integers(0, 3)),
    st.tuples(st.just("close"), st.integers(0, 3)),
    st.tuples(st.just("lock"), st.sampled_from(LOCKS), st.booleans(), st.booleans()),
    st.tuples(
        st.just("rename"),
        st.sampled_from((*NAMES, *LOCKS)),
        st.sampled_from((*NAMES, *LOCKS)),
    ),
    st.tuples(st.just("unlink"), st.sampled_from((*NAMES, *LOCKS))),
    st.tuples(st.just("sync_directory"), st.sampled_from((".", "x"))),
    st.tuples(st.just("power_off")),
)
steps = st.lists(st.tuples(st.sampled_from((0, 1)), step), max_size=40)


class Driver:
    """Runs the steps of one process; what they return or raise must be the same on every disk."""

    def __init__(self, disk, place):
        self.disk = disk
        self.place = place
        self.files = []

    def outcome(self, step):
        try:
            return self.run(*step)
        except OSError as error:
            return type(error).__name__, error.errno
        except (EOFError, StoreLockedError) as error:
            return type(error).__name__

    def run(self, action, *arguments):
        if action in (
            "reopen_to_read",
            "size",
            "read",
            "write",
            "allocate",
            "truncate",
            "sync",
            "close",
        ):
            if not self.files:
                return None
            file = self.files[arguments[0] % len(self.files)]
            return getattr(self, action)(file, *arguments[1:])
        if action == "open":
            self.files.append(self.disk.open(self.place / arguments[0], arguments[1], direct=False))
            return None
        if action == "lock":
            name, exclusive, signed = arguments
            try:
                self.disk.list_directory(self.place / name)
            except OSError:
                file = self.disk.lock(self.place / name, exclusive=exclusive, signed=signed)
                self.files.append(file)
            return None
        if action == "power_off":
            return self.power_off()
        if action == "rename":
            source, target = arguments
            if target.startswith(source):
                return None
            return self.disk.rename(self.place / source, self.place / target)
        return getattr(self.disk, action)(self.place / arguments[0])

    def reopen_to_read(self, file):
        self.files.append(self.disk.open(file.path, "read", direct=False))

    def size(self, file):
        return self.disk.size(file)

    def read(self, file, offset, size_bytes):
        buffers = [np.empty(size_bytes, np.uint8), np.empty(7, np.uint8)]
        self.disk.read_batch(file, [offset, 3], buffers)
        return [buffer.tobytes() for buffer in buffers]

    def write(self, file, offset, size_bytes, value):
        content = np.arange(size_bytes, dtype=np.uint64).astype(np.uint8) ^ np.uint8(value)
        self.disk.write_batch(file, [offset, 5], [content, content[:3].copy()])

    def allocate(self, file, size_bytes):
        self.disk.allocate(file, size_bytes)

    def truncate(self, file, size_bytes):
        self.disk.truncate(file, size_bytes)

    def sync(self, file):
        self.disk.sync(file)

    def close(self, file):
        self.files.remove(file)
        self.disk.close(file)

    def power_off(self):
        """End the process: the operating system closes what it had open."""
        if isinstance(self.disk, FaultDisk):
            self.disk.power_off()
        else:
            for file in self.files:
                self.disk.close(file)
        self.files.clear()


@given(steps)
def test_the_fault_disk_answers_as_the_operating_system_does_to_two_processes(steps):
    fault_disk = FaultDisk()
    fault_disk.make_directory(PLACE)
    fault_disks = (fault_disk, fault_disk.process())
    for process in fault_disks:
        process.process_number = os.getpid()
    with tempfile.TemporaryDirectory() as scratch:
        real = [Driver(OsDisk(), Path(scratch)) for _ in range(2)]
        fake = [Driver(disk, PLACE) for disk in fault_disks]
        try:
            for which, step in steps:
                assert fake[which].outcome(step) == real[which].outcome(step), step
            on_disk = {
                p.relative_to(scratch): p.read_bytes()
                for p in Path(scratch).rglob("*")
                if p.is_file()
            }
            assert on_disk == {
                p.relative_to(PLACE): fault_disk.content(p) for p in fault_disk.files()
            }
        finally:
            for driver in real:
                driver.power_off()


@pytest.fixture
def disk():
    return new_disk()


@pytest.fixture
def file(disk):
    return new_file(disk)


def test_a_direct_file_refuses_what_a_device_refuses(disk, file):
    for offset, buffer in [(1, aligned(0)[0]), (0, aligned(0)[0][:100]), (0, aligned(0, 2)[0][1:])]:
        with pytest.raises(OSError) as refused:
            disk.write_batch(file, [offset], [buffer])
        assert refused.value.errno == errno.EINVAL


def test_a_power_cut_stops_the_operation_it_strikes_and_all_after_it(disk, file):
    disk.cut_after(1)
    with pytest.raises(PowerCut):
        disk.write_batch(file, [0, 4096, 8192], aligned(2, 3))
    assert disk.log.operations[-1].offset == 4096
    for call in (lambda: disk.sync(file), lambda: disk.size(file), lambda: disk.exists(PLACE)):
        with pytest.raises(PowerCut):
            call()
    disk.power_off()
    assert disk.exists(PLACE / "f")


def test_a_full_disk_refuses_growth_and_nothing_else(disk, file):
    disk.capacity_bytes = 12288
    for grow in (
        lambda: disk.allocate(file, 16384),
        lambda: disk.write_batch(file, [8192, 12288], aligned(2, 2)),
    ):
        with pytest.raises(OSError) as refused:
            grow()
        assert refused.value.errno == errno.ENOSPC
    assert disk.size(file) == 8192
    disk.write_batch(file, [0, 4096, 8192], aligned(2, 3))


def test_a_lock_excludes_until_its_process_ends(disk):
    disk.lock(PLACE / "lock", exclusive=True)
    other = disk.process()
    for process in (disk, other):
        for exclusive in (True, False):
            with pytest.raises(StoreLockedError):
                process.lock(PLACE / "lock", exclusive=exclusive)
    other.power_off()
    with pytest.raises(StoreLockedError):
        other.lock(PLACE / "lock", exclusive=False)
    disk.power_off()
    other.lock(PLACE / "lock", exclusive=False)
    disk.lock(PLACE / "lock", exclusive=False)
    with pytest.raises(StoreLockedError):
        disk.lock(PLACE / "lock", exclusive=True)


def test_a_lock_ends_with_close(disk):
    first = disk.lock(PLACE / "lock", exclusive=True)
    disk.close(first)
    second = disk.process().lock(PLACE / "lock", exclusive=True)
    with pytest.raises(StoreLockedError):
        disk.lock(PLACE / "lock", exclusive=True)
    assert second.is_open and not first.is_open


def test_a_lock_is_the_files_and_not_the_names(disk):
    """As a reader's registration is made: locked under one name, then renamed."""
    other = disk.process()
    disk.make_directory(PLACE / "readers")
    file = disk.open(PLACE / "readers/x.new", "create", direct=False)
    lock = disk.lock(PLACE / "readers/x.new", exclusive=True, signed=False)
    disk.rename(PLACE / "readers/x.new", PLACE / "readers/x")
    with pytest.raises(StoreLockedError):
        other.lock(PLACE / "readers/x", exclusive=True, signed=False)
    with pytest.raises(FileNotFoundError):
        other.lock(PLACE / "readers/x.new", exclusive=True, signed=False)
    # A new file under the old name is another file.
    other.close(other.open(PLACE / "readers/x.new", "create", direct=False))
    other.lock(PLACE / "readers/x.new", exclusive=True, signed=False)
    other.unlink(PLACE / "readers/x")
    disk.write_batch(file, [0], aligned(7))
    assert read(disk, file) == page(7), "an open file lives on without a name"
    disk.close(lock)
    assert other.list_directory(PLACE / "readers") == ["x.new"]


def test_two_processes_share_files_and_nothing_of_what_befalls_them(disk, file):
    other = disk.process()
    mine = other.open(PLACE / "f", "write", direct=True)
    other.write_batch(mine, [0], aligned(2))
    assert read(disk, file) == page(2)
    with pytest.raises(OSError) as refused:
        other.size(file)
    assert refused.value.errno == errno.EBADF
    disk.inject(Fault(persistent=True))
    assert other.size(mine) == 8192 and other.n_operations == 4
    other.cut_after(0)
    with pytest.raises(PowerCut):
        other.write_batch(mine, [0], aligned(3))
    with pytest.raises(PowerCut):
        other.size(mine)
    disk.inject(None)
    assert read(disk, file) == page(3) and disk.log is other.log
    other.power_off()
    with pytest.raises(OSError):
        other.size(mine)
    assert read(disk, file) == page(3)


def test_every_process_signs_locks_with_its_own_number(disk):
    for process in (disk, disk.process()):
        file = process.lock(PLACE / "lock", exclusive=True)
        assert disk.content(PLACE / "lock") == str(process.process_number).encode()
        process.close(file)
    assert disk.content(PLACE / "lock") != b"1"


def test_room_of_a_file_without_a_name_is_free_once_it_is_closed(disk, file):
    disk.capacity_bytes = 8192
    disk.unlink(PLACE / "f")
    other = disk.open(PLACE / "g", "create", direct=True)
    with pytest.raises(OSError):
        disk.allocate(other, 8192)
    disk.close(file)
    disk.allocate(other, 8192)


def test_a_flip_goes_unnoticed_by_the_disk(disk, file):
    disk.flip(PLACE / "f", 5, mask=0x82)
    assert disk.content(PLACE / "f")[5] == 1 ^ 0x82
