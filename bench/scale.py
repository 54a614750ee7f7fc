"""Stores of ten and a hundred million pages: how fast they open, and in how much memory they serve.

Each is built with a real map and holes for slots (some 19 bytes a page on disk), then opened by
processes of its own, which read single pages all over it and print

    first open  of the process, which loads compiled code too
    open        once more
    first read  of one page, its path in the map read from the disk
    reads       microseconds of each of the others, map nodes included
    resident    what the process grew by over one that opened a small store with the same budget

For example::

    python -m bench.scale                    10 M and 100 M pages, about 2 GB on disk
    python -m bench.scale --pages 1000000
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.sparse_store import build
from tiers import Store

ROOT = Path(__file__).resolve().parent.parent
BUDGET = "256MiB"
N_READS = 2000
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--directory", type=Path, help="where the stores are to stand")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.turn is not None:
        _turn(json.loads(asked.turn))
        return
    directory = Path(tempfile.mkdtemp(prefix="scale-", dir=asked.directory))
    try:
        small = directory / "small"
        build(small, 1000, np.arange(1000))
        for n_pages in asked.pages:
            _measure(directory, small, n_pages)
    finally:
        shutil.rmtree(directory)


def _measure(directory: Path, small: Path, n_pages: int) -> None:
    path = directory / str(n_pages)
    readable = np.unique(np.random.default_rng(1).integers(0, n_pages, N_READS))
    began = time.perf_counter()
    build(path, n_pages, readable, _tell)
    built_s = time.perf_counter() - began
    turns = [_run({"path": str(path), "pages": n_pages}) for _ in range(ROUNDS)]
    base = _run({"path": str(small), "pages": 1000})
    on_disk = sum(file.stat().st_blocks * 512 for file in path.iterdir() if file.is_file())

    def median(name: str) -> float:
        return float(np.median([turn[name] for turn in turns]))

    print(
        f"\r{n_pages:>13,} pages, {on_disk / 2**20:,.0f} MiB on disk, built in {built_s:.0f} s: "
        f"first open {median('first_open_s') * 1e3:.0f} ms, open {median('open_s') * 1e3:.1f} ms, "
        f"first read {median('first_s') * 1e3:.2f} ms, "
        f"reads {median('reads_us'):.0f} us, account {median('used_bytes') / 2**20:.1f} MiB, "
        f"resident {(median('resident_bytes') - base['resident_bytes']) / 2**20:+.1f} MiB beside "
        f"{base['resident_bytes'] / 2**20:.0f} MiB of a small store; budget {BUDGET}"
    )
    shutil.rmtree(path)


def _tell(done: int, total: int) -> None:
    print(f"\rbuilding {done:,} of {total:,} pages", end="", file=sys.stderr, flush=True)


def _run(turn: dict[str, object]) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.scale", "--turn", json.dumps(turn)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _turn(turn: dict[str, object]) -> None:
    """Open a store and read pages all over it; print figures."""
    import psutil

    n_pages = int(str(turn["pages"]))
    readable = np.unique(np.random.default_rng(1).integers(0, n_pages, N_READS))
    if n_pages == 1000:
        readable = np.arange(1000)
    order = np.random.default_rng(2).permutation(readable)
    began = time.perf_counter()
    Store.open(str(turn["path"]), BUDGET).close()
    first_open_s = time.perf_counter() - began
    began = time.perf_counter()
    with Store.open(str(turn["path"]), BUDGET) as store:
        open_s = time.perf_counter() - began
        space = store.space("pages")
        times = []
        for page in order.tolist():
            began = time.perf_counter()
            with store.claim([(space, np.array([page]))]) as claim:
                assert not store.arena[claim.frames[0][0]].any()
            times.append(time.perf_counter() - began)
        dram = store.stats()["tiers"]["dram"]
        assert dram["peak_bytes"] <= dram["budget_bytes"]
        print(
            json.dumps(
                {
                    "first_open_s": first_open_s,
                    "open_s": open_s,
                    "first_s": times[0],
                    "reads_us": float(np.median(times[1:])) * 1e6,
                    "used_bytes": dram["used_bytes"],
                    "resident_bytes": psutil.Process().memory_info().rss,
                }
            )
        )


if __name__ == "__main__":
    main()
