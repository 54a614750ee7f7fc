"""A store driven at random is what the model says, in memory and on real files."""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from tiers.disk import OsDisk
from tiers.errors import NestedClaimError
from tiers.store import Store
from tiers.testing import FaultDisk, StoreMachine
from tiers.testing.workload import tight_budget_bytes

STEPS = 30


class BrokenSlotsMachine(StoreMachine):
    """Pages of several blocks, so that slots are broken for map nodes."""

    page_bytes = 16384


class OsMachine(StoreMachine):
    def make_disk(self):
        self.scratch = tempfile.mkdtemp()
        return OsDisk(), Path(self.scratch) / "store"

    def teardown(self):
        super().teardown()
        if hasattr(self, "scratch"):
            shutil.rmtree(self.scratch)


@pytest.mark.parametrize("machine", [StoreMachine, BrokenSlotsMachine, OsMachine])
def test_a_store_is_what_the_model_says(machine):
    case = machine.TestCase()
    case.settings = settings(stateful_step_count=STEPS)
    case.runTest()


def test_readers_in_epochs_and_claims_see_whole_pages_while_a_writer_evicts_and_commits():
    """Pages of one space are never written again; all of them are evicted all the time."""
    n_pages, n_rounds = 40, 150
    disk = FaultDisk()
    store = Store.create("/store", tight_budget_bytes(4096), page_size=4096, disk=disk)
    for name in ("still", "busy"):
        store.create_space(name, dtype="uint8", row_width=4096, n_rows=n_pages)
    still, busy = store.space("still"), store.space("busy")
    for page in range(n_pages):
        with store.claim([(still, np.array([page]))], write=True) as claim:
            store.arena[claim.frames[0]] = page
    store.commit()

    def read_in_epochs():
        for _ in range(n_rounds):
            with store.epoch():
                for page in np.flatnonzero(still.page_table >= 0):
                    frame = int(still.page_table[page])
                    if frame >= 0:
                        assert (store.arena[frame] == page).all()
            store.fetch(still, np.array([_ % n_pages]))

    def read_in_claims(seed):
        rng = np.random.default_rng(seed)
        for _ in range(n_rounds):
            pages = np.sort(rng.choice(n_pages, 2, replace=False))
            with store.claim([(still, pages)]) as claim:
                assert (store.arena[claim.frames[0]] == pages[:, None]).all()
                with pytest.raises(NestedClaimError):
                    store.commit()

    def write():
        rng = np.random.default_rng(1)
        values = np.zeros(n_pages, np.uint8)
        committed = values.copy()
        for step in range(n_rounds):
            pages = np.sort(rng.choice(n_pages, 3, replace=False))
            with store.claim([(busy, pages)], write=True) as claim:
                assert (store.arena[claim.frames[0]] == values[pages, None]).all()
                values[pages] = step % 251
                store.arena[claim.frames[0]] = step % 251
            if step % 7 == 6:
                store.commit()
                committed = values.copy()
            elif step % 11 == 10:
                store.abort()
                values = committed.copy()

    with ThreadPoolExecutor(4) as threads:
        work = [
            threads.submit(read_in_epochs),
            threads.submit(read_in_claims, 2),
            threads.submit(read_in_claims, 3),
            threads.submit(write),
        ]
        for job in work:
            job.result(timeout=120)
    store.check()
    assert store.stats()["tiers"]["dram"]["evictions"] > n_rounds
