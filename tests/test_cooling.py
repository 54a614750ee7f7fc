"""Rounds that move pages between the page file and packs of the cold tier."""

import numpy as np
import pytest

from tests.test_cold import PAGE, differing, write
from tiers import Budget, Constant, Store
from tiers.errors import CorruptionError
from tiers.watermarks import Migration


class TestRounds:
    """Migration between the page file and packs."""

    MIGRATION = Migration(interval_s=None, nvme_low=0.5, nvme_high=0.6)
    NVME_BYTES = 8 << 20

    def make(self, path, n_pages=1500):
        budget = Budget("1MiB", nvme=self.NVME_BYTES, cold="1GiB")
        store = Store.create(path, budget, page_size=PAGE, migration=self.MIGRATION)
        space = store.create_space(
            "pages", dtype="uint8", row_width=PAGE, n_rows=n_pages, initial=Constant(7)
        )
        write(store, space, np.arange(n_pages))
        store.commit()
        return store, space

    def tick(self, store, n_rounds=1):
        for _ in range(n_rounds):
            self.now = getattr(self, "now", 0.0) + 1.0
            store.migrator.tick(self.now)

    def test_pages_become_cold_until_the_page_file_is_down_to_the_low_mark(self, tmp_path):
        store, space = self.make(tmp_path / "store")
        assert store.stats()["tiers"]["nvme"]["used_bytes"] > 0.6 * self.NVME_BYTES
        commit = store.commit_number
        self.tick(store, 60)
        used_bytes = store.stats()["tiers"]["nvme"]["used_bytes"]
        assert 0.4 * self.NVME_BYTES < used_bytes <= 0.5 * self.NVME_BYTES
        assert store.commit_number > commit, "nothing was open, so rounds committed"
        assert differing(store, space, np.arange(1500)) == []
        assert store.stats()["migration"]["failure"] is None
        store.check()
        store.close()

    def test_rounds_take_part_in_what_is_open(self, tmp_path):
        store, space = self.make(tmp_path / "store")
        write(store, space, np.arange(10), step=2)
        commit = store.commit_number
        self.tick(store, 5)
        cold = store.is_cold(space, np.arange(1500))
        assert cold.any() and store.commit_number == commit
        store.abort()
        assert not store.is_cold(space, np.arange(1500)).any()
        assert differing(store, space, np.arange(1500)) == []
        store.check()
        store.close()

    def test_pages_in_use_stay(self, tmp_path):
        store, space = self.make(tmp_path / "store")
        hot = np.arange(700, 800)
        for _ in range(3):
            assert differing(store, space, hot) == []
            self.tick(store, 10)
        cold = store.is_cold(space, np.arange(1500))
        assert cold.any() and not cold[700:800].any()
        store.close()

    def test_a_page_that_is_used_again_comes_back(self, tmp_path):
        store, space = self.make(tmp_path / "store")
        self.tick(store, 60)
        cold = np.flatnonzero(store.is_cold(space, np.arange(1500)))[:20]
        assert differing(store, space, cold) == []
        self.tick(store)
        assert store.is_cold(space, cold).all(), "once is not often enough"
        assert differing(store, space, cold) == []
        self.tick(store)
        assert not store.is_cold(space, cold).any()
        assert store.stats()["tiers"]["cold"]["promoted"] == 20
        assert differing(store, space, np.arange(1500)) == []
        store.check()
        store.close()

    def test_worn_packs_are_packed_anew(self, tmp_path):
        store, space = self.make(tmp_path / "store")
        cold = np.arange(1000)
        store.demote(space, cold)
        store.commit()
        write(store, space, cold[cold % 3 > 0], step=2)
        store.commit()
        self.tick(store, 5)
        assert store.stats()["tiers"]["cold"]["repacked"] > 0
        assert differing(store, space, cold[cold % 3 > 0], step=2) == []
        assert differing(store, space, cold[cold % 3 == 0]) == []
        store.check()
        store.close()

    def test_damage_is_passed_over_and_told_to_who_reads(self, tmp_path):
        path = tmp_path / "store"
        store, space = self.make(path)
        block = store._pager.map.entry(16, 0, 900)[0] & ((1 << 48) - 1)
        with (path / "pages").open("r+b") as file:
            file.seek(block * 4096 + 100)
            file.write(b"damaged!")
        self.tick(store, 80)
        stats = store.stats()
        assert stats["migration"]["failure"] is None
        assert stats["tiers"]["nvme"]["used_bytes"] <= 0.5 * self.NVME_BYTES
        with pytest.raises(CorruptionError):
            differing(store, space, np.array([900]))
        store.close()

    def test_the_same_accesses_make_the_same_pages_cold(self, tmp_path):
        found = []
        for name in ("a", "b"):
            self.now = 0.0
            store, space = self.make(tmp_path / name)
            rng = np.random.default_rng(3)
            for _ in range(30):
                differing(store, space, np.unique(rng.integers(0, 1500, 40)))
                self.tick(store)
            found.append(store.is_cold(space, np.arange(1500)))
            store.close()
        assert (found[0] == found[1]).all() and found[0].any()
