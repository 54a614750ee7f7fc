"""Defects that a review of small commits found, each as the property it broke."""

import errno
from pathlib import Path

import numpy as np
import pytest

from tests.fault_disks import new_disk
from tiers import Store
from tiers.allocator import UNKNOWN
from tiers.errors import StoreIOError
from tiers.salvage import salvage
from tiers.testing import Fault, FaultDisk

PATH = Path("/place/store")
PAGE = 4096


def put(store, pages, value):
    space = store.space("a")
    for page in pages:
        with store.claim([(space, np.array([page]))], write=True) as claim:
            store.arena[claim.frames[0]] = value


def value(store, page):
    with store.claim([(store.space("a"), np.array([page]))]) as claim:
        content = store.arena[claim.frames[0][0]]
        assert (content == content[0]).all()
        return int(content[0])


def new_store(disk, n_rows, page_bytes=PAGE, budget="1MiB"):
    store = Store.create(PATH, budget, page_size=page_bytes, disk=disk)
    store.create_space("a", dtype="uint8", row_width=page_bytes, n_rows=n_rows)
    return store


def write_what_is_dirty(store):
    """Write pages as an eviction does; they are named and clean then."""
    store._pager.write_pages(np.flatnonzero(store._pager.frames.dirty))


def test_nodes_that_are_to_be_written_are_not_evicted_by_looking_through_packs():
    """A full list of abandoned versions has packs looked through, which reads bitmaps."""
    disk = new_disk()
    n_pages = 250  # each under a node of its own
    store = new_store(disk, 256 * 256)
    put(store, range(0, 256 * n_pages, 256), 1)
    store.commit()
    store.demote(store.space("a"), np.array([240 * 256, 241 * 256]))
    store.commit()
    while True:
        put(store, [0], 2)
        write_what_is_dirty(store)
        store.abort()
        if store._transaction._are_many_abandoned():
            break
        put(store, [0], 1)
        store.commit()
    put(store, range(5 * 256, 25 * 256, 256), 7)
    write_what_is_dirty(store)
    page_map, key = store._pager.map, (16, 1, 5)

    def oldest():
        nodes = page_map._nodes.values()
        return next(node for node in nodes if not node.n_children and node.block >= 0)

    for page in range(2000):
        if not page_map._free_frames and oldest().key == key:
            break
        value(store, 256 * (30 + page % 210))
    assert oldest().key == key and oldest().dirty
    store.commit()
    store.check()
    store.close()
    with Store.open(PATH, "1MiB", disk=disk) as store:
        found = [value(store, 256 * page) for page in range(n_pages)]
        assert found == [1] * 5 + [7] * 20 + [1] * (n_pages - 25)


def test_one_compaction_uses_the_room_of_the_blocks_that_it_reclaims():
    store = new_store(new_disk(), 4096, 65536, "8MiB")
    put(store, range(600), 1)
    store.commit()
    allocator = store._pager.allocator
    store._transaction.begin_change()
    allocator.ensure(300, 50)
    allocator.take_slots(300)  # nobody refers to them
    store.commit()
    put(store, range(600, 900), 1)
    store.commit()
    first, second = store.compact(), store.compact()
    assert first.blocks_reclaimed and first.pages_moved
    assert second.file_bytes == first.file_bytes and not second.pages_moved
    store.check()
    store.close()


class BadSector(FaultDisk):
    """Refuses to write one block, and what comes after it in a batch."""

    bad = -1

    def write_batch(self, file, offsets, buffers, **options):
        order = sorted(range(len(offsets)), key=offsets.__getitem__)
        place = self.bad * PAGE
        for n_written, i in enumerate(order):
            if file.path.name == "pages" and offsets[i] <= place < offsets[i] + len(buffers[i]):
                good = order[:n_written]
                super().write_batch(
                    file, [offsets[k] for k in good], [buffers[k] for k in good], **options
                )
                raise OSError(errno.EIO, "bad sector")
        super().write_batch(file, offsets, buffers, **options)


def test_a_page_that_was_moved_off_a_bad_slot_is_salvaged_from_where_it_lies():
    disk = BadSector()
    disk.make_directory(PATH.parent)
    disk.sync_directory(Path("/"))
    store = new_store(disk, 64)
    put(store, range(32), 1)
    store.commit()
    put(store, [3], 77)
    (frame,) = np.flatnonzero(store._pager.frames.dirty)
    disk.bad = int(store._pager.frames.block[frame])
    store.commit()
    disk.bad = -1
    assert value(store, 3) == 77
    block = store._pager.map.cached(16, 1, 0).block
    store.close()
    file = disk.open(PATH / "pages", "write", direct=False)
    disk.write_batch(file, [block * PAGE], [np.full(PAGE, 5, np.uint8)])
    disk.sync(file)
    disk.close(file)
    report = salvage(PATH, Path("/place/new"), budget=1 << 20, disk=disk)
    assert report.n_pages == 32 and report.damaged == {}
    with Store.open(Path("/place/new"), "1MiB", disk=disk) as store:
        assert [value(store, page) for page in range(32)] == [1] * 3 + [77] + [1] * 28


def test_a_worn_pack_stays_known_after_a_commit_that_was_refused():
    disk = new_disk()
    store = new_store(disk, 256)
    put(store, range(32), 1)
    store.commit()
    store.demote(store.space("a"), np.arange(8))
    store.commit()
    put(store, [0], 2)
    store.commit()
    worn = set(store._pager.allocator.worn_packs)
    put(store, range(1, 8), 2)
    disk.inject(Fault(error=errno.EIO, kinds=("write",), persistent=True))
    with pytest.raises(StoreIOError):
        store.commit()
    disk.inject(None)
    store.abort()
    assert worn and store._pager.allocator.worn_packs == worn
    store.close()


def test_holes_are_taken_from_the_emptiest_slot_first():
    store = new_store(new_disk(), 4096, 65536, "8MiB")
    allocator = store._pager.allocator
    store._transaction.begin_change()
    allocator.ensure(40, 0)
    slots = allocator.take_slots(17).tolist()
    bitmap = allocator._tree.private_bitmap(0)
    for block in [slot + 7 for slot in slots[1:]] + list(range(slots[0], slots[0] + 15)):
        bitmap[block >> 3] &= np.uint8(0xFF ^ (1 << (block & 7)))
    allocator._forget_summary()
    allocator._search(10, 10**9)
    allocator.is_thrifty = True
    allocator.spare = []
    allocator._refill()
    assert [block // 16 for block in allocator.spare[::-1]][:15] == [slots[0] // 16] * 15


def test_blocks_that_were_let_go_are_found_after_a_read_that_failed():
    disk = new_disk()
    store = new_store(disk, 256 * 512)
    put(store, range(0, 256 * 256, 256), 1)
    store.commit()
    store.discard(store.space("a"), 0, 100 * 256)
    store.commit()
    for page in range(100, 256):  # the bitmap leaves the cache
        value(store, page * 256)
    assert store._pager.map.cached(1, 0, 0) is None
    n_blocks = store._pager.allocator.file_blocks
    disk.inject(Fault(error=errno.EIO, kinds=("read",)))
    with pytest.raises(StoreIOError):
        put(store, [100 * 256], 5)
    disk.inject(None)
    allocator = store._pager.allocator
    assert allocator._free_slots[0] == UNKNOWN and 0 in allocator._unknown
    put(store, range(256, 100 * 256, 256), 2)
    store.commit()
    assert store._pager.allocator.file_blocks == n_blocks
    store.check()
    store.close()
