"""The runners catch the bugs that they are there for: each is planted once, and found."""

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from test_store_corruption import check_flips, check_silent_writes

import tests.forging
import tiers.check
import tiers.page_map
import tiers.pager
import tiers.salvage
import tiers.saved_trees
import tiers.scrub
import tiers.sums
from tests.test_parsers import check_swapped_entries, made
from tiers.allocator import BITMAP_BLOCKS, Allocator
from tiers.errors import NestedClaimError, TierError
from tiers.files import StoreFiles
from tiers.frames import Frames
from tiers.page_map import FIRST_SPACE, PageMap, pack_entry
from tiers.pager import Pager
from tiers.root import BLOCK_BYTES, Root
from tiers.sections import Sections
from tiers.slots import SlotFile
from tiers.store import Store
from tiers.testing import FaultDisk, StoreMachine, check_images
from tiers.testing.crash import check_recording

SEED = 4000


def run_power_cuts():
    for outcome in check_images(SEED, 2000):
        if outcome.violation is not None:
            raise outcome.violation


def run_power_cuts_of_packs():
    """Cuts of recordings that have a cold tier."""
    for seed in range(0, 15, 3):
        for outcome in check_recording(seed, 400):
            if outcome.violation is not None:
                raise outcome.violation


def run_machine():
    case = StoreMachine.TestCase()
    case.settings = settings(
        max_examples=300,
        stateful_step_count=40,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    case.runTest()


def forget_slot_sync(patch):
    patch.setattr(SlotFile, "sync", lambda self: None)


def forget_root_sync(patch):
    def write_root(self, root, copies):
        self._disk.write_batch(self._root_file, [root.slot_offset()], [copies])
        self.root = root

    patch.setattr(StoreFiles, "write_root", write_root)


def write_root_before_the_slots_are_synced(patch):
    sync, write_root = SlotFile.sync, StoreFiles.write_root

    def root_first(self, root, copies):
        write_root(self, root, copies)
        sync(self.slots)

    patch.setattr(SlotFile, "sync", lambda self: None)
    patch.setattr(StoreFiles, "write_root", root_first)


def write_pages_in_place(patch):
    make_pages_private = Pager.make_pages_private

    def in_place(self, requests, frames_of):
        old = [self.map.lookup(FIRST_SPACE + space.number, pages) for space, pages in requests]
        make_pages_private(self, requests, frames_of)
        for entries, frames in zip(old, frames_of, strict=True):
            present = entries[:, 0] != tiers.page_map.ABSENT_WORD
            blocks = entries[:, 0] & np.uint64(tiers.page_map.PLACE_MASK)
            self.frames.block[frames[present]] = blocks[present]

    patch.setattr(Pager, "make_pages_private", in_place)


def reuse_blocks_before_the_commit(patch):
    give_back = Allocator.give_back

    def free_at_once(self, block, n_blocks, version):
        give_back(self, block, n_blocks, version)
        number = block // BITMAP_BLOCKS
        if number in self._pending:
            bitmap = self._tree.private_bitmap(number)
            bitmap &= ~self._pending.pop(number)
            self._used -= n_blocks
            self._summarise(number, bitmap)

    patch.setattr(Allocator, "give_back", free_at_once)


def build_on_a_root_that_may_not_be_durable(patch):
    patch.setattr(StoreFiles, "_confirm", lambda self, path: None)


def remove_packs_before_the_commit_that_empties_them(patch):
    settle, write_root = Allocator.settle, StoreFiles.write_root
    emptied = []

    def settle_and_note(self):
        settle(self)
        emptied[:] = self._emptied

    def remove_first(self, root, copies):
        packs = self.slots.packs
        packs.remove_dead([packs.pack_of(block) for block in emptied])
        write_root(self, root, copies)

    patch.setattr(Allocator, "settle", settle_and_note)
    patch.setattr(StoreFiles, "write_root", remove_first)


def forget_dirty_pages_at_eviction(patch):
    def write_back(self, frames):
        with self.mutex:
            self.frames.writing[frames] = False
            self.frames.dirty[frames] = False
            self.evict(frames)

    patch.setattr(Pager, "write_back", write_back)


def reuse_frames_that_an_epoch_may_read(patch):
    reclaim = Frames.reclaim

    def ignore_epochs(self):
        active, self._active = self._active, {}
        try:
            return reclaim(self)
        finally:
            self._active = active

    patch.setattr(Frames, "reclaim", ignore_epochs)


def believe_pages_unverified(patch):
    patch.setattr(Pager, "verify", lambda self, space, page, place, content: None)
    patch.setattr(Pager, "verify_sums", lambda self, *sums: None)


def believe_map_nodes_unverified(patch):
    patch.setattr(PageMap, "_verify", lambda self, key, raw, place: None)


def leave_the_identity_out_of_the_checksum(patch):
    """Whatever has the right bytes passes: a leaf or page in the place of another one, too."""

    def unbound(content, *identity):
        return google_crc32c.value(content)

    def name_unbound(memory, rows, blocks, identities, parents, places):
        words = memory.view(np.uint64).reshape(len(memory), -1, 2)
        crcs = []
        for i, row in enumerate(rows):
            crcs.append(google_crc32c.value(memory[row]))
            if parents[i] >= 0:
                entry = pack_entry(int(blocks[i]), int(identities[i, 5]), crcs[i])
                words[parents[i], places[i]] = entry
        return np.array(crcs)

    patch.setattr(tiers.sums, "name_rows", name_unbound)
    for module in (
        *(tiers.page_map, tiers.pager, tiers.saved_trees, tiers.check, tiers.scrub),
        *(tiers.salvage, tests.forging),
    ):
        patch.setattr(module, "bound_crc32c", unbound)


def run_swapped_leaves():
    """Exchange leaves of a store that was made just now, and read it."""
    made.cache_clear()
    try:
        check_swapped_entries()
    finally:
        made.cache_clear()


def commit_without_waiting_for_writers(patch):
    class NoLock:
        def acquire(self, timeout=-1):
            return True

        def release(self):
            pass

        __enter__ = acquire

        def __exit__(self, *exception):
            pass

    init = Sections.__init__

    def without(self, *arguments):
        init(self, *arguments)
        self.writer = NoLock()

    patch.setattr(Sections, "__init__", without)


def run_commit_beside_a_writer():
    """Change a page in two halves, and let another thread commit between them."""
    disk = FaultDisk()
    disk.make_directory(Path("/machine"))
    path = Path("/machine/store")
    store = Store.create(path, "2MiB", page_size=4096, disk=disk)
    space = store.create_space("a", dtype="uint8", row_width=4096, n_rows=4)
    store.commit()
    with ThreadPoolExecutor(1) as other:
        with store.claim([(space, np.array([2]))], write=True) as claim:
            page = store.arena[claim.frames[0][0]]
            page[:2048] = 1
            committed = other.submit(store.commit)
            # It ends only if it does not wait, and then what it wrote is half a change.
            wait([committed], 0.5)
            page[2048:] = 1
        committed.result()
    disk.power_off()
    with Store.open(path, "2MiB", disk=disk) as store:
        space = store.space("a")
        with store.claim([(space, np.array([2]))]) as claim:
            found = store.arena[claim.frames[0][0]]
            assert (found == found[0]).all(), "a commit wrote half a change"


def write_one_root_copy(patch):
    encode = Root.encode

    def first_copy_only(self):
        both = encode(self)
        both[BLOCK_BYTES:] = 0
        return both

    patch.setattr(Root, "encode", first_copy_only)


SEEN_AS = {reuse_frames_that_an_epoch_may_read: "a frame was reused too early"}


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (forget_slot_sync, run_power_cuts),
        (forget_root_sync, run_power_cuts),
        (write_root_before_the_slots_are_synced, run_power_cuts),
        (write_pages_in_place, run_power_cuts),
        (reuse_blocks_before_the_commit, run_power_cuts),
        (build_on_a_root_that_may_not_be_durable, run_power_cuts),
        (forget_dirty_pages_at_eviction, run_power_cuts),
        (remove_packs_before_the_commit_that_empties_them, run_power_cuts_of_packs),
        (forget_slot_sync, run_machine),
        (write_pages_in_place, run_machine),
        (reuse_blocks_before_the_commit, run_machine),
        (forget_dirty_pages_at_eviction, run_machine),
        (reuse_frames_that_an_epoch_may_read, run_machine),
        (believe_pages_unverified, check_silent_writes),
        (believe_map_nodes_unverified, check_silent_writes),
        (believe_pages_unverified, check_flips),
        (write_one_root_copy, check_flips),
        (leave_the_identity_out_of_the_checksum, run_swapped_leaves),
        (commit_without_waiting_for_writers, run_commit_beside_a_writer),
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant, run):
    plant(monkeypatch)
    # What a runner may not do at all would pass for a bug that it caught.
    with pytest.raises((AssertionError, TierError), match=SEEN_AS.get(plant)) as caught:
        run()
    assert not isinstance(caught.value, NestedClaimError)


@pytest.mark.parametrize("run", [check_silent_writes, check_flips, run_commit_beside_a_writer])
def test_without_a_bug_nothing_is_found(run):
    run()
