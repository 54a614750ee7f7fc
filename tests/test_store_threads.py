"""Readers, a writer, prefetch, commits and aborts at once: no deadlock, no torn or stale page."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tiers import Space, Store
from tiers.errors import NestedClaimError, TierError
from tiers.pager import Pager
from tiers.testing.stress import GROWTH_BYTES_MAX, Stress

SECONDS = float(os.environ.get("DPNC_THREADS_SECONDS", "8"))
STRESS_SECONDS = float(os.environ.get("DPNC_STRESS_SECONDS", "20"))
N_PAGES = 150


def stamp(content: np.ndarray, page: int, number: int) -> None:
    words = content.view(np.uint64)
    words[:] = np.uint64(page) << np.uint64(32) | np.uint64(number)


def read_stamp(content: np.ndarray, page: int) -> int:
    words = content.view(np.uint64)
    if words[0] == 0 and not words.any():
        return 0
    assert (words == words[0]).all(), "a torn page"
    assert int(words[0]) >> 32 == page, "another page's bytes"
    return int(words[0]) & 0xFFFFFFFF


class Model:
    """What each page may read as: what the last writes left, committed and not."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.current = [0] * N_PAGES
        self.committed = [0] * N_PAGES
        self.number = 0


def run_writer(store: Store, space: Space, model: Model, stop: threading.Event, seed: int) -> None:
    generator = np.random.default_rng(seed)
    while not stop.is_set():
        pages = np.unique(generator.integers(0, N_PAGES, generator.integers(1, 12)))
        with store.write_section():
            with store.claim([(space, pages)], write=True) as claim:
                with model.guard:
                    model.number += 1
                    number = model.number
                for page, frame in zip(pages, claim.frames[0], strict=True):
                    assert read_stamp(store.arena[frame], page) == model.current[page]
                    stamp(store.arena[frame], int(page), number)
                    model.current[page] = number
            choice = generator.random()
            if choice < 0.1:
                store.commit(meta={"number": number})
                model.committed = list(model.current)
            elif choice < 0.13:
                store.abort()
                model.current = list(model.committed)


def run_reader(store: Store, space: Space, stop: threading.Event, seed: int) -> None:
    generator = np.random.default_rng(seed)
    while not stop.is_set():
        pages = np.unique(generator.integers(0, N_PAGES, generator.integers(1, 15)))
        with store.claim([(space, pages)]) as claim:
            frames = claim.frames[0]
            for page, frame in zip(pages, frames, strict=True):
                assert space.page_table[page] == frame
                # A writer may be at work on this very page; its words are whole one by one.
                words = store.arena[frame].view(np.uint64)
                owners = np.unique(words >> np.uint64(32))
                assert set(owners.tolist()) <= {0, int(page)}, "another page's bytes"


def run_epochs(store: Store, space: Space, stop: threading.Event, seed: int) -> None:
    generator = np.random.default_rng(seed)
    while not stop.is_set():
        with store.epoch():
            pages = generator.integers(0, N_PAGES, 8)
            seen = [(int(page), int(space.page_table[page])) for page in pages]
            for _ in range(3):
                for page, frame in seen:
                    if frame >= 0:
                        owner = int(store.arena[frame, :8].view(np.uint64)[0]) >> 32
                        assert owner in (0, page), "a frame was reused in an epoch"


def run_prefetch(store: Store, space: Space, stop: threading.Event, seed: int) -> None:
    generator = np.random.default_rng(seed)
    while not stop.is_set():
        first = int(generator.integers(0, N_PAGES - 20))
        store.fetch(space, np.arange(first, first + 20))


def test_everything_at_once_for_a_while(tmp_path: Path) -> None:
    model = Model()
    stop = threading.Event()
    failures: list[BaseException] = []
    with Store.create(tmp_path / "store", "520KiB", page_size=4096) as store:
        space = store.create_space("words", dtype="uint64", row_width=512, n_rows=N_PAGES)
        store.commit()
        assert store.n_frames < N_PAGES // 2
        tasks = [
            lambda: run_writer(store, space, model, stop, 1),
            *[lambda seed=seed: run_reader(store, space, stop, seed) for seed in range(2, 6)],
            lambda: run_epochs(store, space, stop, 7),
            lambda: run_prefetch(store, space, stop, 8),
        ]

        def guarded(task: object) -> None:
            try:
                task()  # type: ignore[operator]
            except BaseException as failure:
                failures.append(failure)
                stop.set()

        threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while not stop.wait(0.2):
            # On a busy machine the writer may need longer until everything has happened once.
            n_ended = min(store.stats()["commits"] - 1, store.stats()["aborts"] * 3)
            if time.monotonic() > began + (SECONDS if n_ended > 2 else 8 * SECONDS):
                break
        stop.set()
        deadline = time.monotonic() + 60
        for thread in threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        assert not failures, failures
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
        store.check()
        counts = store.stats()
        assert counts["tiers"]["dram"]["evictions"] > 0
        assert counts["commits"] > 3
        assert counts["aborts"] > 0
        for page in range(N_PAGES):
            with store.claim([(space, np.array([page]))]) as claim:
                assert read_stamp(store.arena[claim.frames[0][0]], page) == model.current[page]
    with Store.open(tmp_path / "store", "520KiB") as store:
        space = store.space("words")
        for page in range(N_PAGES):
            with store.claim([(space, np.array([page]))]) as claim:
                assert read_stamp(store.arena[claim.frames[0][0]], page) == model.committed[page]


@pytest.mark.timeout(300 + 2 * STRESS_SECONDS)
def test_readers_writers_and_the_daemon_agree_with_a_locked_model(tmp_path: Path) -> None:
    stress = Stress(tmp_path, seed=3)
    report = stress.run(STRESS_SECONDS)
    assert report.counts["readers: claims compared"] > 0
    assert report.counts["writer: claims"] > 0
    assert report.counts["daemon: rounds"] > 0
    # What is loaded at the beginning counts in a run that is so short.
    assert report.growth_bytes <= 4 * GROWTH_BYTES_MAX


def test_an_abort_that_keeps_pages_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pager, "forget_private", lambda self: None)
    with pytest.raises((AssertionError, TierError)):
        Stress(tmp_path, seed=3).run(10 * STRESS_SECONDS)


def test_a_thread_that_reads_cannot_wait_for_itself(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store", "400KiB", page_size=4096) as store:
        space = store.create_space("words", dtype="uint64", row_width=512, n_rows=N_PAGES)
        with store.claim([(space, np.arange(store.n_frames))]):
            with pytest.raises(NestedClaimError):
                store.claim([(space, np.array([N_PAGES - 1]))])
            with pytest.raises(NestedClaimError):
                store.claim([(space, np.array([0]))], write=True)
            with store.claim([(space, np.array([0]))]):
                pass
            with pytest.raises(NestedClaimError):
                store.commit(meta={})
        with store.epoch(), pytest.raises(NestedClaimError):
            store.claim([(space, np.array([N_PAGES - 1]))])
        store.claim([(space, np.array([N_PAGES - 1]))]).release()
        store.check()


def test_a_fetch_and_a_scrub_end_beside_demand_that_never_rests(tmp_path):
    with Store.create(tmp_path / "store", "2MiB", page_size=4096) as store:
        space = store.create_space("pages", dtype="uint8", row_width=4096, n_rows=100)
        with store.claim([(space, np.arange(40))], write=True) as claim:
            store.arena[claim.frames[0]] = 5
        store.commit()
        store._pager.forget_everything()
        store._claims.n_waiting = 1  # a claim that waits, and another one whenever it has its turn
        assert store.fetch(space, np.arange(40)) == 40
        assert store.scrub().n_pages == 40
        store._claims.n_waiting = 0
