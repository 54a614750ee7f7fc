"""Faults strike what and when they are told to, and loudly or without a word."""

import errno

import numpy as np
import pytest
from fault_disks import PLACE, aligned, contents, images, new_disk, new_file, page, read

from tiers.testing import Fault, FaultDisk
from tiers.testing.clock import VirtualClock
from tiers.testing.faults import ERRORS, KINDS, STRIKES


@pytest.fixture
def disk():
    return new_disk()


@pytest.fixture
def file(disk):
    return new_file(disk)


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
