"""A field whose pages lie in every tier gives the same bits as one in memory."""

import time

import numpy as np

import dpnc
from dpnc import Budget, Migration
from tests.fields import batches

PAGE = 4096


def run(path, budget, migration, *, by_hand=False):
    """Fit a field for some steps; return its digest, what it answers, and its stats."""
    encoding = dpnc.HashGrid(
        n_dims=2,
        n_levels=8,
        n_features_per_level=2,
        log2_hashmap_size=16,
        base_resolution=8,
        per_level_scale=1.8,
    )
    field = dpnc.create(
        path,
        encoding,
        budget=budget,
        optimizer=dpnc.Adam(1e-2),
        head=dpnc.Head(n_outputs=1, n_hidden=8),
        page_size=PAGE,
        migration=migration,
    )
    for number, (x, grad) in enumerate(batches(12, 1200, 2, 1)):
        field.update(x, grad, wrt="decoded")
        field.query(x[:100])
        if number % 3 == 2:
            field.commit(meta={"step": number})
        if by_hand:
            tick(field, number)
    field.commit()
    answers = field.decode(np.random.default_rng(5).random((3000, 2)))
    if by_hand:
        for number in range(20, 60):
            tick(field, number)
    found = field.digest(), answers, field.stats()
    field.close()
    return found


def tick(field, number):
    field.store.migrator.tick(float(number))


def test_the_same_bits_from_every_tier(tmp_path):
    digest, answers, _ = run(tmp_path / "memory", "64MiB", None)
    # So little room in the page file that most pages must become cold.
    budget = Budget("1MiB", cxl="128KiB", nvme="16MiB", cold="1GiB")
    migration = Migration(interval_s=None, nvme_low=0.2, nvme_high=0.25)
    tiered = run(tmp_path / "tiers", budget, migration, by_hand=True)
    assert tiered[0] == digest
    assert (tiered[1] == answers).all()
    cold = tiered[2]["tiers"]["cold"]
    assert cold["demoted"] > 100 and cold["pages_read"] > 0
    assert tiered[2]["migration"]["failure"] is None
    with dpnc.open(tmp_path / "tiers", budget="2MiB", read_only=True) as field:
        assert field.digest() == digest


def test_a_daemon_works_beside_a_fit(tmp_path):
    digest, answers, _ = run(tmp_path / "memory", "64MiB", None)
    budget = Budget("1MiB", nvme="16MiB", cold="1GiB")
    migration = Migration(interval_s=0.005, nvme_low=0.2, nvme_high=0.25)
    beside = run(tmp_path / "tiers", budget, migration)
    assert beside[0] == digest and (beside[1] == answers).all()
    assert beside[2]["migration"]["failure"] is None
    with dpnc.open(tmp_path / "tiers", budget=budget, migration=migration) as field:
        until_s = time.monotonic() + 60
        while not field.stats()["tiers"]["cold"]["used_bytes"] and time.monotonic() < until_s:
            time.sleep(0.01)
        assert field.stats()["tiers"]["cold"]["used_bytes"]
        assert field.digest() == digest
        assert field.stats()["migration"]["failure"] is None
