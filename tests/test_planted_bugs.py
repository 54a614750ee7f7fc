"""The runners catch the bugs that they are there for: each is planted once, and found."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from test_store_corruption import check_flips, check_silent_writes

import tiers.page_map
from tiers.allocator import BITMAP_BLOCKS, Allocator
from tiers.errors import NestedClaimError, TierError
from tiers.files import StoreFiles
from tiers.frames import Frames
from tiers.page_map import FIRST_SPACE
from tiers.pager import Pager
from tiers.root import BLOCK_BYTES, Root
from tiers.slots import SlotFile
from tiers.testing import StoreMachine, check_images

SEED = 4000


def run_power_cuts():
    for outcome in check_images(SEED, 2000):
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
    def write_root(self, root):
        self._disk.write_batch(self._root_file, [root.slot_offset()], [root.encode()])
        self.root = root

    patch.setattr(StoreFiles, "write_root", write_root)


def write_root_before_the_slots_are_synced(patch):
    sync, write_root = SlotFile.sync, StoreFiles.write_root

    def root_first(self, root):
        write_root(self, root)
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


def believe_map_nodes_unverified(patch):
    patch.setattr(tiers.page_map, "bound_crc32c", lambda *identity: 0)


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
        (forget_slot_sync, run_machine),
        (write_pages_in_place, run_machine),
        (reuse_blocks_before_the_commit, run_machine),
        (forget_dirty_pages_at_eviction, run_machine),
        (reuse_frames_that_an_epoch_may_read, run_machine),
        (believe_pages_unverified, check_silent_writes),
        (believe_map_nodes_unverified, check_silent_writes),
        (believe_pages_unverified, check_flips),
        (write_one_root_copy, check_flips),
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant, run):
    plant(monkeypatch)
    # What a runner may not do at all would pass for a bug that it caught.
    with pytest.raises((AssertionError, TierError), match=SEEN_AS.get(plant)) as caught:
        run()
    assert not isinstance(caught.value, NestedClaimError)


@pytest.mark.parametrize("run", [check_silent_writes, check_flips])
def test_without_a_bug_nothing_is_found(run):
    run()
