"""An image holds what POSIX lets a disk hold after a power cut, and all of that in some image."""

import numpy as np
import pytest
from fault_disks import PLACE, aligned, contents, images, new_disk, new_file
from hypothesis import given
from hypothesis import strategies as st

from tiers.testing import Fault, FaultDisk, power_cut
from tiers.testing.images import PowerCuts
from tiers.testing.log import Make, Names, Resize, Write


@pytest.fixture
def disk():
    return new_disk()


@pytest.fixture
def file(disk):
    return new_file(disk)


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
            size_bytes, chunks = remains.answer((inode, (1, 0, 2)))
            assert size_bytes == file.size_bytes
            content = chunks[1] + chunks[0] + chunks[2]
            assert content == file.read(0, 12288).ljust(12288, b"\0")
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
