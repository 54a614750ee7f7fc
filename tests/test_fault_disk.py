"""A fault disk answers as the operating system does, and loses what POSIX lets it lose."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.disk import OsDisk, aligned_buffer
from tiers.errors import StoreLockedError
from tiers.testing import Fault, FaultDisk, PowerCut, power_cut
from tiers.testing.clock import VirtualClock
from tiers.testing.faults import ERRORS, KINDS, STRIKES
from tiers.testing.images import PowerCuts
from tiers.testing.log import Make, Names, Resize, Write

PLACE = Path("/place")
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


def read(disk, file, offset=0):
    (buffer,) = aligned(0)
    disk.read_batch(file, [offset], [buffer])
    return buffer.tobytes()


def page(value):
    return bytes([value]) * 4096


def test_a_write_can_be_lost_or_misdirected_without_a_word(disk, file):
    disk.inject(Fault(kinds=("write",), silent="lose"))
    disk.write_batch(file, [0], aligned(2))
    assert disk.content(PLACE / "f") == page(1) * 2
    disk.inject(Fault(kinds=("write",), silent="misdirect", displacement_bytes=4096))
    disk.write_batch(file, [0], aligned(2))
    assert disk.content(PLACE / "f") == page(1) + page(2)


def test_one_buffer_of_a_batch_is_struck(disk, file):
    disk.inject(Fault(silent="lose", kinds=("write",), buffer=3))
    disk.write_batch(file, [0, 4096], aligned(2, 2))
    assert disk.content(PLACE / "f") == page(2) + page(1)


def test_a_forgotten_write_is_shown_until_the_power_goes_off_and_not_after(disk, file):
    disk.inject(Fault(silent="forget", kinds=("write",)))
    disk.write_batch(file, [0], aligned(2))
    disk.write_batch(file, [4096], aligned(3))
    disk.sync(file)
    assert disk.content(PLACE / "f") == page(2) + page(3)
    assert contents(images(disk)) == {page(1) + page(3)}


def test_a_reordered_write_is_passed_by_one_sync_and_durable_after_the_next(disk, file):
    disk.inject(Fault(silent="reorder"))
    disk.write_batch(file, [0], aligned(2))
    disk.write_batch(file, [4096], aligned(3))
    disk.sync(file)
    assert disk.content(PLACE / "f") == page(2) + page(3)
    found = contents(images(disk))
    assert {page(1) + page(3), page(2) + page(3)} < found
    assert {content[4096:] for content in found} == {page(3)}
    disk.sync(file)
    assert contents(images(disk)) == {page(2) + page(3)}


def test_a_bit_can_turn_over_on_the_way_down_or_up(disk, file):
    disk.inject(Fault(silent="flip", kinds=("read",), bit=8 * 4096 + 9))
    assert read(disk, file) == bytes([1, 3]) + page(1)[2:]
    assert read(disk, file) == page(1)
    disk.inject(Fault(silent="flip", kinds=("write",), bit=10))
    disk.write_batch(file, [0], aligned(2))
    assert disk.content(PLACE / "f") == bytes([2, 6]) + page(2)[2:] + page(1)


def test_a_stale_read_gives_the_bytes_before_the_last_write(disk, file):
    disk.write_batch(file, [4096], aligned(2))
    disk.write_batch(file, [0], aligned(3))
    disk.inject(Fault(silent="stale", persistent=True))
    assert read(disk, file) == page(1)
    assert read(disk, file, 4096) == page(1)
    disk.inject(None)
    assert read(disk, file) == page(3)
    other = disk.open(PLACE / "g", "create", direct=True)
    disk.write_batch(other, [0], aligned(4))
    disk.inject(Fault(silent="stale"))
    assert read(disk, other) == page(0)


def test_a_read_can_be_misdirected(disk, file):
    disk.write_batch(file, [4096], aligned(2))
    disk.inject(
        Fault(silent="misdirect", kinds=("read",), displacement_bytes=4096, persistent=True)
    )
    assert read(disk, file) == page(2)
    assert read(disk, file, 4096) == page(0), "past the end there is nothing"


@pytest.mark.parametrize("how", ["lose", "forget"])
@pytest.mark.parametrize(("kind", "size_bytes"), [("allocate", 40960), ("truncate", 4096)])
def test_a_change_of_length_can_be_lost_or_forgotten(disk, file, how, kind, size_bytes):
    disk.inject(Fault(silent=how, kinds=(kind,)))
    getattr(disk, kind)(file, size_bytes)
    disk.sync(file)
    assert disk.size(file) == (8192 if how == "lose" else size_bytes)
    assert contents(images(disk)) == {page(1) * 2}


def test_a_sync_can_be_lost(disk, file):
    disk.write_batch(file, [0], aligned(2))
    disk.inject(Fault(silent="lose", kinds=("sync",)))
    disk.sync(file)
    assert {page(1) * 2, page(2) + page(1)} < contents(images(disk))
    disk.sync(file)
    assert contents(images(disk)) == {page(2) + page(1)}


def change_names(disk, change):
    if change == "rename":
        disk.rename(PLACE / "f", PLACE / "g")
    elif change == "unlink":
        disk.unlink(PLACE / "f")
    elif change == "open":
        disk.sync(disk.open(PLACE / "g", "create", direct=False))
    else:
        disk.make_directory(PLACE / "g")


NAMES_AFTER = {"rename": ("g",), "unlink": (), "open": ("f", "g"), "make_directory": ("f", "g")}


@pytest.mark.parametrize("change", NAMES_AFTER)
def test_a_directory_entry_is_in_doubt_after_a_sync_of_its_directory_that_was_lost(
    disk, file, change
):
    disk.inject(Fault(silent="lose", kinds=("sync_directory",)))
    change_names(disk, change)
    disk.sync_directory(PLACE)
    after = NAMES_AFTER[change]
    assert tuple(disk.list_directory(PLACE)) == after
    assert {tuple(image.list_directory(PLACE)) for image in images(disk)} == {("f",), after}
    disk.sync_directory(PLACE)
    assert {tuple(image.list_directory(PLACE)) for image in images(disk)} == {after}


@pytest.mark.parametrize("change", NAMES_AFTER)
def test_a_directory_entry_that_was_forgotten_is_gone_after_every_sync(disk, file, change):
    disk.inject(Fault(silent="forget", kinds=(change,)))
    change_names(disk, change)
    disk.sync_directory(PLACE)
    disk.sync_directory(PLACE)
    assert tuple(disk.list_directory(PLACE)) == NAMES_AFTER[change]
    assert {tuple(image.list_directory(PLACE)) for image in images(disk)} == {("f",)}


@pytest.mark.parametrize("change", ["rename", "unlink"])
def test_a_change_of_names_can_be_lost(disk, file, change):
    disk.inject(Fault(silent="lose", kinds=(change,)))
    change_names(disk, change)
    assert disk.list_directory(PLACE) == ["f"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", ERRORS)
def test_any_operation_can_fail_once_or_from_then_on(kind, error):
    disk = FaultDisk()
    disk.make_directory(PLACE)
    file = disk.open(PLACE / "f", "create", direct=False)
    disk.write_batch(file, [0], aligned(1))
    calls = {
        "make_directory": lambda: disk.make_directory(PLACE / f"d{disk.n_operations}"),
        "list_directory": lambda: disk.list_directory(PLACE),
        "open": lambda: disk.open(PLACE / "f", "write", direct=False),
        "size": lambda: disk.size(file),
        "read": lambda: read(disk, file),
        "write": lambda: disk.write_batch(file, [0], aligned(2)),
        "allocate": lambda: disk.allocate(file, 8192),
        "sync": lambda: disk.sync(file),
        "truncate": lambda: disk.truncate(file, 4096),
        "lock": lambda: disk.lock(PLACE / f"l{disk.n_operations}", exclusive=True),
        "rename": lambda: disk.rename(PLACE / "f", PLACE / "f"),
        "unlink": lambda: disk.unlink(disk.open(PLACE / "u", "create", direct=False).path),
        "sync_directory": lambda: disk.sync_directory(PLACE),
    }
    assert set(calls) == set(KINDS)
    raised = error if isinstance(error, type) else OSError
    disk.inject(Fault(at=2, error=error, kinds=(kind,)))
    calls[kind]()
    with pytest.raises(raised) as caught:
        calls[kind]()
    assert raised is not OSError or caught.value.errno == error
    if kind == "unlink":
        disk.unlink(PLACE / "u")
    assert not disk.is_armed
    calls[kind]()
    disk.inject(Fault(at=1, error=error, kinds=(kind,), persistent=True))
    for _ in range(3):
        with pytest.raises(raised):
            calls[kind]()
        if kind == "unlink":
            disk.inject(None)
            disk.unlink(PLACE / "u")
            disk.inject(Fault(at=1, error=error, kinds=(kind,), persistent=True))
    assert disk.is_armed


def test_a_slow_device_moves_the_clock_and_nothing_else(disk):
    clock = VirtualClock()
    slow = FaultDisk(disk.twin().log.base, clock=clock)
    slow.inject(
        Fault(silent="delay", delay_us=70, kinds=("read",), persistent=True),
        Fault(silent="delay", delay_us=5000, kinds=("sync",)),
    )
    file = slow.open(PLACE / "f", "create", direct=True)
    slow.write_batch(file, [0], aligned(1))
    assert clock.now_us == 0
    for n_reads in range(1, 4):
        assert read(slow, file) == page(1)
        assert clock.now_us == 70 * n_reads
    slow.sync(file)
    slow.sync(file)
    assert clock.now_us == 210 + 5000
    with pytest.raises(ValueError, match="-1 us"):
        clock.advance(-1)


def test_faults_add_up_and_each_counts_its_own_operations(disk, file):
    disk.inject(
        Fault(at=2, silent="flip", kinds=("write",), bit=0),
        Fault(at=2, silent="misdirect", kinds=("write",), displacement_bytes=4096),
        Fault(at=1, kinds=("sync",), delay_us=30),
        Fault(at=3, error=MemoryError, kinds=("write", "sync")),
    )
    disk.write_batch(file, [0], aligned(2))
    disk.write_batch(file, [0], aligned(4))
    assert disk.content(PLACE / "f") == page(2) + bytes([5]) + page(4)[1:]
    # The third of writes and syncs, and the first sync: the error given first is raised.
    with pytest.raises(OSError):
        disk.sync(file)
    assert disk.clock.now_us == 30 and not disk.is_armed


@pytest.mark.parametrize(
    "wrong",
    [
        {"silent": "vanish"},
        {"silent": "stale", "kinds": ("write",)},
        {"silent": "reorder", "kinds": ("write", "sync")},
        {"kinds": ("close",)},
        {"silent": "misdirect"},
        {"silent": "delay"},
        {"delay_us": -1},
        {"at": 0},
    ],
)
def test_a_fault_that_could_not_strike_is_refused(wrong):
    with pytest.raises(ValueError, match=r"\w"):
        Fault(**wrong)


def test_the_matrix_has_every_fault_of_every_operation():
    found = {(fault.silent or fault.error, fault.kinds) for fault in Fault.matrix()}
    silent = {(how, (kind,)) for how, kinds in STRIKES.items() for kind in kinds}
    assert found == silent | {(error, (kind,)) for error in ERRORS for kind in KINDS}
    assert {Fault.random(np.random.default_rng(n), 5).silent for n in range(300)} == {
        None,
        *STRIKES,
    }


changes = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 1), st.integers(0, 9000), st.integers(1, 9000)),
    st.tuples(st.just("write"), st.integers(0, 1), st.sampled_from((0, 4096)), st.just(8192)),
    st.tuples(st.just("truncate"), st.integers(0, 1), st.integers(0, 20000)),
    st.tuples(st.just("allocate"), st.integers(0, 1), st.integers(1, 20000)),
    st.tuples(st.just("sync"), st.integers(0, 1)),
    st.tuples(st.just("rename"), st.integers(0, 1), st.integers(0, 1)),
    st.tuples(st.just("create")),
    st.tuples(st.just("unlink"), st.integers(0, 1)),
    st.tuples(st.just("sync_directory")),
    st.tuples(st.just("fault"), st.integers(0, 1 << 32)),
)


def changed_disk(steps):
    """Return a disk on which random changes were made under random faults."""
    base = FaultDisk()
    base.make_directory(PLACE)
    held = base.open(PLACE / "held", "create", direct=False)
    base.write_batch(held, [0], [np.full(9000, 200, np.uint8)])
    disk = FaultDisk(base.twin().log.base)
    files = [disk.open(PLACE / "held", "write", direct=False)]
    files.append(disk.open(PLACE / "new", "create", direct=False))
    for number, (action, *arguments) in enumerate(steps, start=1):
        try:
            if action == "fault":
                disk.inject(Fault.random(np.random.default_rng(arguments[0]), 3))
            elif action == "write":
                which, offset, size_bytes = arguments
                content = np.full(size_bytes, number % 251, np.uint8)
                disk.write_batch(files[which], [offset], [content])
            elif action in ("truncate", "allocate"):
                getattr(disk, action)(files[arguments[0]], arguments[1])
            elif action == "sync":
                disk.sync(files[arguments[0]])
            elif action == "rename":
                disk.rename(files[arguments[0]].path, PLACE / f"n{arguments[1]}")
            elif action == "create":
                disk.open(PLACE / "more", "create", direct=False)
            elif action == "unlink":
                disk.unlink(files[arguments[0]].path)
            else:
                disk.sync_directory(PLACE)
        except (OSError, MemoryError):
            pass
    return disk


def replayed(log, cut, is_durable):
    """Return the files and names that a cut leaves, replayed one change after another."""
    tree = log.base.copy()
    synced = {inode: content.size_bytes for inode, content in tree.files.items()}
    for position, change in enumerate(log.operations[: cut.k]):
        if not isinstance(change, Make | Write | Resize | Names):
            continue
        if not is_durable[position] and position not in cut.survivors:
            continue
        if position in cut.tears:
            size_bytes = len(change.content)
            old = tree.files[change.inode].read(change.offset, size_bytes).ljust(size_bytes, b"\0")
            pairs = zip(cut.tears[position].tolist(), change.content, old, strict=True)
            mixed = bytes(new if is_new else before for is_new, new, before in pairs)
            change = Write(change.inode, change.offset, mixed)
        tree.apply(change)
        if is_durable[position] and isinstance(change, Resize):
            synced[change.inode] = change.size_bytes
        elif is_durable[position] and isinstance(change, Write):
            end = change.offset + len(change.content)
            synced[change.inode] = max(synced.get(change.inode, 0), end)
    for inode in cut.shrunk:
        size_bytes = synced.get(inode, 0)
        if tree.files[inode].size_bytes > size_bytes:
            tree.files[inode].resize(size_bytes)
    return tree


def durable_after(log, k):
    """Say of each change whether it was durable when the log had `k` operations, by definition."""
    durable = [isinstance(change, Make) for change in log.operations[:k]]
    n_passed = dict.fromkeys(log.betrayals, 0)
    dropped = set()
    for position, change in enumerate(log.operations[:k]):
        kind = type(change).__name__
        if kind not in ("Sync", "SyncDirectory"):
            continue
        for earlier in range(position):
            before = log.operations[earlier]
            if durable[earlier] or earlier in dropped:
                continue
            if log.betrayals.get(earlier) == "forgotten":
                continue
            if kind == "Sync" and getattr(before, "inode", None) == change.inode:
                if not isinstance(before, Write | Resize):
                    continue
                if log.betrayals.get(earlier) == "late" and not n_passed[earlier]:
                    n_passed[earlier] = 1
                elif change.succeeded:
                    durable[earlier] = True
                elif isinstance(before, Write):
                    dropped.add(earlier)
            elif kind == "SyncDirectory" and isinstance(before, Names):
                durable[earlier] = any(d == change.directory for d, _, _ in before.changes)
    return durable


@given(st.lists(changes, max_size=25), st.integers(0, 1 << 32))
def test_an_image_is_what_a_replay_of_the_survivors_leaves(steps, seed):
    disk = changed_disk(steps)
    cuts = PowerCuts(disk.log)
    rng = np.random.default_rng(seed)
    for k in rng.permutation(len(disk.log.operations) + 1).tolist():
        cut = cuts.choose(k, rng)
        is_durable = durable_after(disk.log, k)
        in_doubt = {
            position
            for position, change in enumerate(disk.log.operations[:k])
            if isinstance(change, Write | Resize | Names)
            and not is_durable[position]
            and disk.log.betrayals.get(position) != "forgotten"
        }
        assert cut.survivors <= in_doubt
        expected = replayed(disk.log, cut, is_durable)
        remains = cuts.remains(cut)
        for inode, file in expected.files.items():
            assert remains.has_file(inode) and remains.size_bytes(inode) == file.size_bytes
            content = b"".join(remains.chunk(inode, number) for number in (1, 0, 2))
            assert content[4096:8192] + content[:4096] + content[8192:] == file.read(
                0, 12288
            ).ljust(12288, b"\0")
        image = cuts.image(cut)
        found = image.log.base
        assert found.directories == expected.directories
        assert {inode: file.read(0, 1 << 20) for inode, file in found.files.items()} == {
            inode: file.read(0, 1 << 20) for inode, file in expected.files.items()
        }
        # What is done to one image is not seen in the next.
        for path in image.files():
            image.replace(path, b"spoilt")


def test_every_change_in_doubt_survives_in_some_image_and_not_in_others():
    disk = changed_disk([("write", 0, 0, 100), ("write", 1, 50, 9000), ("rename", 1, 0)])
    cuts = PowerCuts(disk.log)
    k = len(disk.log.operations)
    found = [cuts.choose(k, np.random.default_rng(seed)) for seed in range(200)]
    in_doubt = {
        position
        for position, change in enumerate(disk.log.operations)
        if isinstance(change, Write | Resize | Names)
    }
    assert set.union(*[set(cut.survivors) for cut in found]) == in_doubt
    assert set.intersection(*[set(cut.survivors) for cut in found]) == set()
    assert {position for cut in found for position in cut.tears} == {
        position for position in in_doubt if isinstance(disk.log.operations[position], Write)
    }


def test_the_same_seed_makes_the_same_faults_and_the_same_log(disk):
    steps = [("fault", 5), ("write", 0, 0, 5000), ("sync", 0), ("fault", 9), ("rename", 0, 1)] * 3
    first, second = changed_disk(steps), changed_disk(steps)
    assert first.log.operations == second.log.operations
    assert first.log.betrayals == second.log.betrayals
    assert Fault.random(np.random.default_rng(3), 7) == Fault.random(np.random.default_rng(3), 7)


def test_a_cut_that_the_log_does_not_reach_is_refused(disk):
    with pytest.raises(ValueError, match="-1"):
        power_cut(disk.log, -1, np.random.default_rng(0))


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
