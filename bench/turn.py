"""One turn of one contender, in a process of its own: read batches, print how long each took.

The process first opens the contender with a small cache and reads a batch, which loads and compiles
what it needs, and joins the memory cgroup then: the group's limit is spent on cached pages and not
on code.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from bench.contenders import CONTENDERS, PAGE_BYTES
from bench.patterns import SLIDING_STEP_PAGES, batches
from tiers.disk import aligned_buffer

LOADING_CACHE_BYTES = 16 << 20


def main() -> None:
    """Take the turn that the first argument describes (JSON); print the seconds (JSON)."""
    turn = json.loads(sys.argv[1])
    contender = next(each for each in CONTENDERS if each.name == turn["contender"])
    directory, n_pages = Path(turn["directory"]), turn["n_pages"]
    if turn["pattern"] is None:
        contender.prepare(directory, n_pages)
        return
    # Of whole pages: some processors copy five times slower to 16 bytes beyond the place within a
    # page that they copy from, which is where numpy's own memory begins (glibc bug 30994).
    target = aligned_buffer(turn["batch"], PAGE_BYTES)
    target[:] = 1
    read = contender.open(directory, n_pages, min(LOADING_CACHE_BYTES, turn["cache_bytes"]))
    read(np.arange(0, 2 * turn["batch"], 2), target)
    del read
    gc.collect()
    if turn["group"]:
        Path(turn["group"]).write_text(str(os.getpid()))
    read = contender.open(directory, n_pages, turn["cache_bytes"])
    cache_pages = turn["cache_bytes"] // PAGE_BYTES
    coming = batches(turn["pattern"], n_pages, turn["batch"], cache_pages // 2, turn["seed"])

    def timed(pages: np.ndarray) -> float:
        began = time.perf_counter()
        read(pages, target)
        seconds = time.perf_counter() - began
        numbers = target[: len(pages), :8].copy().view("<u8")[:, 0]
        if not np.array_equal(numbers, pages):
            raise SystemExit(f"{contender.name}: wrong pages, {numbers} for {pages}")
        return seconds

    # Until the cache is full and has turned over once, as far as there is time for it. Before that
    # a store still touches fresh memory, which takes longer than a read where huge pages are made.
    warm = 0.0
    n_new_pages = SLIDING_STEP_PAGES if turn["pattern"] == "sliding" else turn["batch"]
    for _ in range(-(-2 * cache_pages // n_new_pages)):
        warm += timed(next(coming))
        if warm > 6 * turn["seconds"]:
            break
    taken: dict[str, list[float]] = {"batch": [], "single": []}
    while sum(taken["batch"]) < turn["seconds"]:
        taken["batch"].append(timed(next(coming)))
    while sum(taken["single"]) < turn["seconds"]:
        for page in np.random.default_rng(0).permutation(next(coming)):
            taken["single"].append(timed(np.array([page])))
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
