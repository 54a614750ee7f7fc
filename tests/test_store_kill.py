"""A process that is killed at any moment loses nothing that it was told is committed."""

import os
from collections import Counter

import pytest

from tiers.store import Store
from tiers.testing.kills import ACTIVITIES, kills

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
N_KILLS = 30


def run_kills(directory, count):
    counts = Counter()
    for outcome in kills(3, count, directory):
        if outcome.violation is not None:
            raise outcome.violation
        counts += outcome.counts
    return counts


@pytest.mark.timeout(120 + 20 * N_KILLS * SCALE)
def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path):
    counts = run_kills(tmp_path, N_KILLS * SCALE)
    killed = {during: counts[f"killed when {during}"] for during in ACTIVITIES}
    assert sum(killed.values()) == N_KILLS * SCALE
    assert all(killed[during] for during in ACTIVITIES[1:]), killed


@pytest.mark.timeout(300)
def test_a_commit_that_is_acknowledged_too_early_is_caught(tmp_path, monkeypatch):
    """The parent looks at another state than the last: as if a commit had been lost."""
    original = Store.open.__func__

    def forget_a_step(cls, *arguments, **options):
        store = original(cls, *arguments, **options)
        store._transaction.catalogue.meta["step"] -= 1
        return store

    monkeypatch.setattr(Store, "open", classmethod(forget_a_step))
    with pytest.raises(AssertionError, match="was acknowledged"):
        run_kills(tmp_path, 4)
