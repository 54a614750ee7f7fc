"""A store that migrates and changes its size, driven at random; planted bugs are caught."""

import threading

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tiers import Budget
from tiers.errors import BudgetError, NestedClaimError, TierError
from tiers.frames import Frames
from tiers.memory import budget_min
from tiers.migration import Migrator
from tiers.pager import Pager
from tiers.testing import StoreMachine
from tiers.watermarks import Migration

PAGE = 4096


class TieredMachine(StoreMachine):
    """With CXL memory, rounds of migration at random times, and other budgets at random."""

    n_cxl = 6
    migration = Migration(
        interval_s=None, low=0.2, high=0.4, rest_rounds=0, memory=0.5, bytes_per_s=40 * PAGE
    )
    now = 0.0

    def _budget_bytes(self):
        cxl_bytes = self.n_cxl * self.page_bytes
        least = budget_min(self.page_bytes, cxl_bytes=cxl_bytes)
        return Budget(
            least + self.extra_frames * (self.page_bytes + 200) + 3000, cxl=cxl_bytes or None
        )

    @rule(wait=st.sampled_from((0.0, 0.1, 1.0)))
    def tick(self, wait):
        self.now += wait
        self.migrator.tick(self.now)

    @rule(extra=st.integers(0, 12), n_cxl=st.sampled_from((0, 1, 6, 10)))
    def resize(self, extra, n_cxl):
        before = self.store.budget, self.store.n_frames
        self.extra_frames, self.n_cxl = extra, n_cxl
        try:
            self.store.resize(self._budget_bytes())
        except BudgetError:
            assert (self.store.budget, self.store.n_frames) == before
        else:
            assert self.store.budget == self._budget_bytes()

    @precondition(lambda self: self.store.spaces)
    @rule(which=st.integers(0, 3), pages=st.sets(st.integers(0, 39), min_size=1, max_size=6))
    def read_often(self, which, pages):
        space, indices = self._choose(which, pages)
        for _ in range(2):
            with self.store.claim([(space, indices)]) as claim:
                for page, frame in zip(indices.tolist(), claim.frames[0].tolist(), strict=True):
                    assert self.store.arena[frame].tobytes() == self.model.read(space.name, page)

    @precondition(lambda self: self.store.spaces)
    @rule(n_ticks=st.integers(1, 4), which=st.integers(0, 3))
    def tick_beside_a_claim_and_an_epoch(self, n_ticks, which):
        """What is held stays where it is, and what is seen mapped keeps its bytes."""
        space = self.store.spaces[which % len(self.store.spaces)]
        held = space.table.pages()[:4]
        seen = {}
        for other in self.store.spaces:
            pages = other.table.pages()
            for page, frame in zip(pages.tolist(), other.table.lookup(pages), strict=True):
                seen[int(frame)] = self.model.read(other.name, page)
        migrator = self.migrator
        with self.store.epoch(), self.store.claim([(space, held)]) as claim:

            def beside():
                for _ in range(n_ticks):
                    self.now += 0.5
                    migrator.tick(self.now)
                    self.store.fetch(*self._choose(which, {n_ticks, 11, 12, 13}))

            failures = []
            thread = threading.Thread(target=lambda: _keep(failures, beside))
            thread.start()
            thread.join()
            assert not failures, failures
            assert (space.table.lookup(held) == claim.frames[0]).all(), "a pinned page moved"
            for frame, content in seen.items():
                assert self.store.arena[frame].tobytes() == content, "a frame was reused too early"

    @property
    def migrator(self):
        """Of the store that is open now."""
        if getattr(self, "_of", None) is not self.store:
            self._of = self.store
            store = self.store
            self._migrator = Migrator(store._pager, store._claims, store._condition, self.migration)
        return self._migrator


def _keep(failures, call):
    try:
        call()
    except BaseException as failure:
        failures.append(failure)


class PlainMachine(TieredMachine):
    """The same without CXL memory at first."""

    n_cxl = 0


def run_machine(machine, n_examples=None, steps=30):
    case = machine.TestCase()
    case.settings = settings(stateful_step_count=steps)
    if n_examples is not None:
        case.settings = settings(
            max_examples=n_examples,
            stateful_step_count=steps,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
    case.runTest()


@pytest.mark.parametrize("machine", [TieredMachine, PlainMachine])
def test_a_store_that_migrates_is_what_the_model_says(machine):
    run_machine(machine)


# Planted bugs


def reuse_a_frame_at_once(patch):
    move = Frames.move

    def early(self, spaces, sources, targets):
        move(self, spaces, sources, targets)
        if len(sources):
            self.return_free(self._limbo.pop()[1])

    patch.setattr(Frames, "move", early)


def lose_the_dirty_flag(patch):
    move = Frames.move

    def clean(self, spaces, sources, targets):
        move(self, spaces, sources, targets)
        self.dirty[targets] = False

    patch.setattr(Frames, "move", clean)


def lose_the_slot(patch):
    move = Frames.move

    def forgetful(self, spaces, sources, targets):
        move(self, spaces, sources, targets)
        self.private[targets] = False

    patch.setattr(Frames, "move", forgetful)


def promote_what_is_pinned(patch):
    """Neither asked nor asserted: the pin goes on to name the frame that the page left."""
    move = Pager.move

    def anyway(self, sources, targets):
        pins = self.frames.pins[sources].copy()
        self.frames.pins[sources] = 0
        n_moved = move(self, sources, targets)
        self.frames.pins[sources] = pins
        return n_moved

    def swaps(self, count):
        evictable = Frames.evictable
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Frames, "evictable", lambda frames: frames.space >= 0)
            chosen = right(self, count)
        assert evictable is Frames.evictable
        return chosen

    right = Migrator._swaps
    patch.setattr(Migrator, "_swaps", swaps)
    patch.setattr(Pager, "move", anyway)


@pytest.mark.parametrize(
    ("plant", "seen_as"),
    [
        (reuse_a_frame_at_once, "reused too early"),
        (lose_the_dirty_flag, None),
        (lose_the_slot, None),
        (promote_what_is_pinned, None),
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant, seen_as):
    plant(monkeypatch)
    with pytest.raises((AssertionError, TierError), match=seen_as) as caught:
        run_machine(TieredMachine, n_examples=600, steps=40)
    assert not isinstance(caught.value, NestedClaimError)
