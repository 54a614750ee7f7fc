"""A store with a cold tier, driven at random; planted bugs are caught."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.test_migration_machine import run_machine
from tiers import Budget
from tiers.allocator import Allocator
from tiers.cooling import Cooling
from tiers.errors import StoreFullError, StoreIOError, TierError
from tiers.migration import Migrator
from tiers.packs import Packs
from tiers.testing import Fault, PowerCut, StoreMachine
from tiers.testing.workload import tight_budget_bytes
from tiers.transaction import Transaction
from tiers.watermarks import Migration

PAGE = 4096
SHARES = st.sampled_from(((0, 1), (0, 2), (1, 2), (1, 3)))
"""Which pages of those that are stored: every second one, from the second on."""


class ColdMachine(StoreMachine):
    """Pages become cold and come back, by call and by rounds, in transactions and beside them."""

    # So little that every round finds the page file too full.
    migration = Migration(interval_s=None, bytes_per_s=200 * PAGE, nvme_low=0.0, nvme_high=0.0)
    now = 0.0

    @initialize()
    def begin(self):
        super().begin()
        for pages in ({0, 1, 2, 3}, {8, 9, 10}, {30, 31}):
            self.write(which=0, pages=pages, seed=len(pages), whole=True)
        self.commit(None)
        self.demote(which=0, share=(0, 2), begin="open")
        self.commit(None)

    def _budget_bytes(self):
        return Budget(
            tight_budget_bytes(self.page_bytes, self.extra_frames), nvme="1GiB", cold="1GiB"
        )

    @precondition(lambda self: self.store.spaces)
    @rule(which=st.integers(0, 3), share=SHARES, begin=st.sampled_from(("commit", "abort", "open")))
    def demote(self, which, share, begin):
        """Mostly after a commit: what is written in the open transaction does not move."""
        if begin == "commit":
            self.commit(None)
        elif begin == "abort":
            self.abort()
        if not self.store.spaces:
            return
        space, indices = self._stored(which, share)
        before = self.store.is_cold(space, indices)
        try:
            n_moved = self.store.demote(space, indices)
        except StoreFullError:
            assert self.disk.capacity_bytes is not None
            return
        after = self.store.is_cold(space, indices)
        assert not (before & ~after).any()
        assert n_moved == int((after & ~before).sum())

    @precondition(lambda self: self.store.spaces)
    @rule(which=st.integers(0, 3), share=SHARES)
    def promote(self, which, share):
        space, indices = self._stored(which, share)
        was_cold = self.store.is_cold(space, indices)
        try:
            n_moved = self.store.promote(space, indices)
        except StoreFullError:
            assert self.disk.capacity_bytes is not None
            return
        assert n_moved == int(was_cold.sum())
        assert not self.store.is_cold(space, indices).any()

    @rule(wait=st.sampled_from((0.0, 0.1, 1.0)))
    def tick(self, wait):
        self.now += wait
        was_open = self.store._transaction.is_changed
        with self._room():
            self.migrator.tick(self.now)
        if not was_open:
            assert not self.store._transaction.is_changed, "a round left its changes open"

    @precondition(lambda self: self.store.spaces)
    @rule(which=st.integers(0, 3), share=SHARES)
    def read_twice(self, which, share):
        space, indices = self._stored(which, share)
        indices = indices[:6]
        for _ in range(2):
            with self.store.claim([(space, indices)]) as claim:
                for page, frame in zip(indices.tolist(), claim.frames[0].tolist(), strict=True):
                    assert self.store.arena[frame].tobytes() == self.model.read(space.name, page)

    @precondition(lambda self: self.store.spaces)
    @rule(which=st.integers(0, 3), share=SHARES, at=st.integers(1, 60))
    def fail_in_a_demotion(self, which, share, at):
        space, indices = self._stored(which, share)
        self.disk.inject(Fault(at))
        with suppress(StoreIOError, StoreFullError):
            self.store.demote(space, indices)
        self.disk.inject(None)

    @rule()
    def compact(self):
        self.abort()
        with self._room():
            self.store.compact()

    def _stored(self, which, share):
        space = self.store.spaces[which % len(self.store.spaces)]
        stored = [*self.store.stored_pages(space), np.empty(0, np.int64)]
        return space, np.concatenate(stored)[share[0] :: share[1]]

    @property
    def migrator(self):
        """Of the store that is open now."""
        if getattr(self, "_of", None) is not self.store:
            self._of = store = self.store
            cooling = Cooling(
                store._pager,
                store._transaction,
                store._cold,
                store._sections.alone,
                self.migration,
            )
            self._migrator = Migrator(
                store._pager, store._claims, store._condition, self.migration, cooling
            )
        return self._migrator


def test_a_store_with_a_cold_tier():
    run_machine(ColdMachine)


def _forgets_to_sync(original):
    def write(self, pack, ids, content):
        disk = self._disk
        sync, sync_directory = disk.sync, disk.sync_directory
        disk.sync = disk.sync_directory = lambda what: None
        try:
            original(self, pack, ids, content)
        finally:
            disk.sync, disk.sync_directory = sync, sync_directory

    return write


def _removes_new_packs(original):
    def commit_catalogue(self, catalogue):
        packs = list(self._new_packs)
        root = original(self, catalogue)
        self._pager.slots.packs.remove_dead(packs)
        return root

    return commit_catalogue


def _keeps_the_bits(original):
    def take_cold(self, block, n_blocks):
        self.cold_blocks += n_blocks

    return take_cold


@pytest.mark.parametrize(
    ("owner", "name", "plant"),
    [
        (Packs, "write", _forgets_to_sync),
        (Transaction, "commit_catalogue", _removes_new_packs),
        (Allocator, "take_cold", _keeps_the_bits),
    ],
    ids=["packs are not synced", "new packs are removed", "no bits"],
)
def test_planted_bugs_are_caught(monkeypatch, owner, name, plant):
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises((AssertionError, TierError, PowerCut)):
        run_machine(ColdMachine, n_examples=300, steps=40)
