"""A fault disk answers as the operating system does, and loses what POSIX lets it lose."""

import errno
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.disk import OsDisk, aligned_buffer
from tiers.errors import StoreLockedError
from tiers.testing import Fault, FaultDisk, PowerCut, power_cut

PLACE = Path("/place")
NAMES = ("a", "b", "d", "d/a", "d/b", "e")

steps = st.lists(
    st.one_of(
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
        st.tuples(st.just("lock"), st.sampled_from(("lock", "d/lock", "x/lock")), st.booleans()),
        st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
        st.tuples(st.just("unlink"), st.sampled_from(NAMES)),
        st.tuples(st.just("sync_directory"), st.sampled_from((".", "x"))),
    ),
    max_size=40,
)


class Driver:
    """Runs steps on one disk; what a step returned or raised must be the same on every disk."""

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
            self.files.append(self.disk.lock(self.place / arguments[0], exclusive=arguments[1]))
            return None
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


@given(steps)
def test_the_fault_disk_answers_as_the_operating_system_does(steps):
    fault_disk = FaultDisk()
    fault_disk.make_directory(PLACE)
    with tempfile.TemporaryDirectory() as scratch:
        drivers = [Driver(OsDisk(), Path(scratch)), Driver(fault_disk, PLACE)]
        try:
            for step in steps:
                expected, found = (driver.outcome(step) for driver in drivers)
                assert found == expected, step
            on_disk = {
                p.relative_to(scratch): p.read_bytes()
                for p in Path(scratch).rglob("*")
                if p.is_file()
            }
            assert on_disk == {
                p.relative_to(PLACE): fault_disk.content(p) for p in fault_disk.files()
            }
        finally:
            for file in drivers[0].files:
                drivers[0].disk.close(file)


def aligned(value, n_pages=1):
    content = aligned_buffer(n_pages, 4096)
    content[:] = value
    return list(content)


@pytest.fixture
def disk():
    disk = FaultDisk()
    disk.make_directory(PLACE)
    disk.sync_directory(Path("/"))
    return disk


@pytest.fixture
def file(disk):
    """Return a synced file of two pages of ones, its name durable."""
    file = disk.open(PLACE / "f", "create", direct=True)
    disk.write_batch(file, [0, 4096], aligned(1, 2))
    disk.sync(file)
    disk.sync_directory(PLACE)
    return file


def images(disk, count=200, k=None):
    length = len(disk.log.operations) if k is None else k
    return [power_cut(disk.log, length, np.random.default_rng(seed)) for seed in range(count)]


def contents(disks, path=PLACE / "f"):
    return {disk.content(path) if disk.exists(path) else None for disk in disks}


def test_a_direct_file_refuses_what_a_device_refuses(disk, file):
    for offset, buffer in [(1, aligned(0)[0]), (0, aligned(0)[0][:100]), (0, aligned(0, 2)[0][1:])]:
        with pytest.raises(OSError) as refused:
            disk.write_batch(file, [offset], [buffer])
        assert refused.value.errno == errno.EINVAL


def test_what_is_synced_survives_every_image(disk, file):
    assert contents(images(disk)) == {bytes([1]) * 8192}


def test_what_is_not_synced_may_survive_or_not_or_be_torn(disk, file):
    disk.write_batch(file, [0], aligned(2))
    found = contents(images(disk))
    old, new = bytes([1]) * 8192, bytes([2]) * 4096 + bytes([1]) * 4096
    assert {old, new} < found
    assert all(set(content[:4096]) <= {1, 2} and content[4096:] == old[4096:] for content in found)


def test_a_later_write_may_survive_without_an_earlier_one(disk, file):
    disk.write_batch(file, [0], aligned(2))
    disk.write_batch(file, [4096], aligned(3))
    assert bytes([1]) * 4096 + bytes([3]) * 4096 in contents(images(disk))
    assert bytes([2]) * 4096 + bytes([1]) * 4096 in contents(images(disk))


def test_a_synced_write_is_never_overtaken_by_an_earlier_one_in_doubt(disk, file):
    disk.write_batch(file, [0], aligned(2))
    disk.inject(Fault(kinds=("sync",)))
    with pytest.raises(OSError):
        disk.sync(file)
    disk.write_batch(file, [0], aligned(3))
    disk.sync(file)
    assert contents(images(disk)) == {bytes([3]) * 4096 + bytes([1]) * 4096}


def test_a_write_whose_sync_failed_stays_in_doubt_after_a_sync_that_succeeds(disk, file):
    disk.write_batch(file, [0], aligned(2))
    disk.inject(Fault(kinds=("sync",)))
    with pytest.raises(OSError):
        disk.sync(file)
    disk.sync(file)
    assert bytes([1]) * 8192 in contents(images(disk))


def test_unsynced_growth_may_be_lost(disk, file):
    disk.allocate(file, 40960)
    sizes = {len(content) for content in contents(images(disk))}
    assert sizes == {8192, 40960}


def test_the_name_of_a_synced_file_may_be_lost_until_its_directory_is_synced(disk):
    file = disk.open(PLACE / "f", "create", direct=False)
    disk.write_batch(file, [0], aligned(1))
    disk.sync(file)
    assert contents(images(disk)) == {None, bytes([1]) * 4096}
    disk.sync_directory(PLACE)
    assert contents(images(disk)) == {bytes([1]) * 4096}


def test_a_rename_is_whole_or_not_at_all(disk, file):
    disk.rename(PLACE / "f", PLACE / "g")
    assert {tuple(image.list_directory(PLACE)) for image in images(disk)} == {("f",), ("g",)}
    disk.sync_directory(PLACE)
    assert {tuple(image.list_directory(PLACE)) for image in images(disk)} == {("g",)}


def test_an_image_knows_nothing_of_what_came_later(disk, file):
    k = len(disk.log.operations)
    disk.write_batch(file, [0], aligned(2))
    disk.sync(file)
    assert contents(images(disk, k=k)) == {bytes([1]) * 8192}


def test_the_same_generator_gives_the_same_image(disk, file):
    disk.write_batch(file, [0, 4096], aligned(2, 2))
    disk.allocate(file, 40960)
    first, second = images(disk, 50), images(disk, 50)
    assert [d.content(PLACE / "f") for d in first] == [d.content(PLACE / "f") for d in second]


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


def test_a_fault_strikes_once_or_from_then_on(disk, file):
    disk.inject(Fault(at=2, error=errno.ENOSPC, kinds=("write",)))
    disk.write_batch(file, [0], aligned(2))
    with pytest.raises(OSError) as refused:
        disk.write_batch(file, [0, 4096], aligned(3, 2))
    assert refused.value.errno == errno.ENOSPC
    assert disk.content(PLACE / "f") == bytes([3]) * 4096 + bytes([1]) * 4096, (
        "half of it was written"
    )
    disk.write_batch(file, [0], aligned(4))
    disk.inject(Fault(persistent=True, kinds=("write",)))
    for _ in range(3):
        with pytest.raises(OSError):
            disk.write_batch(file, [0], aligned(5))
    disk.inject(None)
    disk.write_batch(file, [0], aligned(6))


def test_a_write_can_be_lost_or_misdirected_without_a_word(disk, file):
    disk.inject(Fault(kinds=("write",), silent="lose"))
    disk.write_batch(file, [0], aligned(2))
    assert disk.content(PLACE / "f") == bytes([1]) * 8192
    disk.inject(Fault(kinds=("write",), silent="misdirect", displacement_bytes=4096))
    disk.write_batch(file, [0], aligned(2))
    assert disk.content(PLACE / "f") == bytes([1]) * 4096 + bytes([2]) * 4096


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


def test_a_lock_excludes_until_the_power_goes_off(disk):
    disk.lock(PLACE / "lock", exclusive=True)
    with pytest.raises(StoreLockedError):
        disk.lock(PLACE / "lock", exclusive=True)
    with pytest.raises(StoreLockedError):
        disk.lock(PLACE / "lock", exclusive=False)
    disk.power_off()
    disk.lock(PLACE / "lock", exclusive=False)
    disk.lock(PLACE / "lock", exclusive=False)
    with pytest.raises(StoreLockedError):
        disk.lock(PLACE / "lock", exclusive=True)


def test_a_flip_goes_unnoticed_by_the_disk(disk, file):
    disk.flip(PLACE / "f", 5, mask=0x82)
    assert disk.content(PLACE / "f")[5] == 1 ^ 0x82
