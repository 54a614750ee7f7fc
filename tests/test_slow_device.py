"""A device a hundred times slower: the same results, and migration that leaves demand its time.

Delays are on the fault disk's virtual clock, so nothing here waits for them.
"""

import numpy as np
import pytest
from test_store_corruption import PATH, Session, new_disk

from tiers import Budget
from tiers.memory import budget_min
from tiers.migration import Migrator
from tiers.space import SpaceSpec, Uniform
from tiers.store import Store
from tiers.testing import Fault, Model
from tiers.watermarks import Migration

DELAY_US = 10_000
"""Of each operation; a usual device takes a hundredth."""
KINDS = ("read", "write", "allocate", "sync", "truncate")
PAGE = 4096
N_PAGES = 80
N_CXL = 6


def make_slow(disk, delay_us=DELAY_US):
    disk.inject(Fault(kinds=KINDS, silent="delay", delay_us=delay_us, persistent=True))


def test_a_slow_device_changes_no_result():
    slow, usual = Session(new_disk()), Session(new_disk())
    make_slow(slow.disk)
    for session in (slow, usual):
        for step in session.steps():
            step()
        session.store.snapshots.take("last")
        session.model.committed = session.model.committed.with_snapshot("last")
        session.model.abort()
        assert not session.store.scrub().damaged
        session.store.compact()
        session.store.check()
        session.reopen()
        session.read()
        session.store.close()
    assert slow.states[-1] == usual.states[-1]
    assert slow.disk.clock.now_us > 100 * DELAY_US
    assert usual.disk.clock.now_us == 0


class Work:
    """Batches of pages, hot and cold ones, read and written beside rounds of migration."""

    def __init__(self, migration, *, seed=5, delay_us=DELAY_US):
        self.rng = np.random.default_rng(seed)
        self.disk = new_disk()
        self.clock = self.disk.clock
        self.model = Model(PAGE)
        cxl_bytes = N_CXL * PAGE
        budget = Budget(budget_min(PAGE, cxl_bytes=cxl_bytes) + 10 * PAGE, cxl=cxl_bytes)
        self.store = Store.create(PATH, budget, page_size=PAGE, disk=self.disk, migration=migration)
        spec = SpaceSpec("a", "float32", 1024, N_PAGES, Uniform(-1.0, 1.0))
        self.space = self.store.create_space(
            "a", dtype="float32", row_width=1024, n_rows=N_PAGES, initial=spec.initial
        )
        self.model.create_space(spec)
        make_slow(self.disk, delay_us)
        self.demand_us = 0
        self.demands_us = []

    def batch(self):
        hot = self.rng.random(6) < 0.7
        numbers = np.where(hot, self.rng.integers(0, 12, 6), self.rng.integers(0, N_PAGES, 6))
        pages = np.unique(numbers).astype(np.int64)
        write = bool(self.rng.random() < 0.3)
        began_us = self.clock.now_us
        with self.store.claim([(self.space, pages)], write=write) as claim:
            self.demands_us.append(self.clock.now_us - began_us)
            for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
                assert self.store.arena[frame].tobytes() == self.model.read("a", page)
                if write:
                    content = self.rng.bytes(PAGE)
                    self.store.arena[frame] = np.frombuffer(content, np.uint8)
                    self.model.write("a", page, content)
        # What a kernel would do with them.
        self.clock.advance(2000)

    def commit(self):
        self.store.commit()
        self.model.commit(None)


ON = Migration(
    interval_s=None, low=0.1, high=0.3, rest_rounds=0, bytes_per_s=40 * PAGE, burst_bytes=8 * PAGE
)


def test_migration_on_a_slow_device_keeps_to_its_bandwidth_and_delays_no_demand():
    with_rounds, without = Work(ON), Work(None)
    migrator = with_rounds.store.migrator
    began_s = with_rounds.clock.now_us / 1e6
    for number in range(400):
        for work in (with_rounds, without):
            work.batch()
            if number % 40 == 39:
                work.commit()
        migrator.tick(with_rounds.clock.now_us / 1e6)
        passed_s = with_rounds.clock.now_us / 1e6 - began_s
        # A page that was written, and demoted beside it, counts twice; one round may end over.
        most_bytes = ON.bytes_per_s * passed_s + ON.burst_bytes + 3 * ON.pages_max * PAGE
        assert migrator.bytes_moved <= most_bytes
    assert migrator.bytes_moved > 0
    for work in (with_rounds, without):
        work.store.check()
        assert work.model.current.difference(work.store) is None
    assert sum(with_rounds.demands_us) <= 1.1 * sum(without.demands_us)
    # One page that is read, and what gives way for it written with its tag and map nodes.
    assert max(with_rounds.demands_us) <= max(without.demands_us) + 4 * DELAY_US


def test_a_daemon_on_a_slow_device_ends_when_the_store_does():
    work = Work(Migration(interval_s=0.001, low=0.1, high=0.3, rest_rounds=0))
    for number in range(150):
        work.batch()
        if number % 30 == 29:
            work.commit()
    work.store.check()
    assert work.store.migrator.failure is None
    daemon = work.store._daemon
    work.store.close()
    assert not daemon.is_running
    with Store.open(PATH, work.store.budget, disk=work.disk) as store:
        assert work.model.committed.difference(store) is None


def migrate_whatever_it_costs(patch):
    patch.setattr(Migrator, "_pages_affordable", lambda self, transfers: 64)


def test_migration_without_a_cap_is_caught(monkeypatch):
    migrate_whatever_it_costs(monkeypatch)
    with pytest.raises(AssertionError):
        test_migration_on_a_slow_device_keeps_to_its_bandwidth_and_delays_no_demand()
