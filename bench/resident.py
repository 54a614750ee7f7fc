"""How much memory a store takes: the process against its budget, in a memory cgroup of that size.

A process first warms up: it imports everything and works on a small store, so that code and
libraries are there. Then it joins a memory cgroup (version 1) whose limit is the budget and 16 MiB,
opens a store several times larger, and reads, writes, migrates, demotes, scrubs and commits all
over it, twice in a row, the second time reopened. The group ends a process that takes more. Printed
are the account's peak, and by how much the resident size grew over the warmed process.

For example::

    python -m bench.resident                         64 MiB, 512 MiB of data
    python -m bench.resident --budget 16MiB --mib 256
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from bench import cgroup
from tiers import Budget, Migration, Store
from tiers.budget import parse_size

ROOT = Path(__file__).resolve().parent.parent
PAGE_BYTES = 65536
BATCH_PAGES = 32
ALLOWED_BYTES = 16 << 20
"""Beside the budget: buffers of the interpreter, stacks of threads."""


def main() -> int:
    """Run the command line; return 1 if a process took more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="64MiB")
    parser.add_argument("--mib", type=int, default=512, help="of data")
    parser.add_argument("--directory", type=Path, help="where the stores are to stand")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.turn is not None:
        _turn(json.loads(asked.turn))
        return 0
    refusal = cgroup.refusal()
    if refusal:
        print(f"without a group, resident size only: {refusal}")
    directory = Path(tempfile.mkdtemp(prefix="resident-", dir=asked.directory))
    budget_bytes = parse_size(asked.budget)
    turn = {"directory": str(directory), "budget": asked.budget, "mib": asked.mib, "group": None}
    try:
        if refusal:
            done = _run(turn)
        else:
            with cgroup.limited(budget_bytes + ALLOWED_BYTES) as group:
                done = _run({**turn, "group": str(group)})
    finally:
        shutil.rmtree(directory)
    if done.returncode:
        print(f"the process ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        return 1
    held = True
    for number, found in enumerate(json.loads(done.stdout), 1):
        allowed = budget_bytes + ALLOWED_BYTES
        held &= found["grown_bytes"] <= allowed and found["peak_bytes"] <= budget_bytes
        print(
            f"round {number}: account {found['peak_bytes'] / 2**20:.1f} of "
            f"{budget_bytes / 2**20:.1f} MiB, process grew by at most "
            f"{found['grown_bytes'] / 2**20:.1f} of {allowed / 2**20:.1f} MiB"
        )
    return 0 if held else 1


def _run(turn: dict[str, object]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.resident", "--turn", json.dumps(turn)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def _turn(turn: dict[str, object]) -> None:
    directory, mib = Path(str(turn["directory"])), int(str(turn["mib"]))
    _work(directory / "small", "8MiB", 32, reopened=False)
    _work(directory / "small", "8MiB", 32, reopened=True)
    if turn["group"]:
        Path(str(turn["group"])).write_text(str(os.getpid()))
    found = []
    for reopened in (False, True):
        with _Watch() as watch:
            peak_bytes = _work(directory / "large", str(turn["budget"]), mib, reopened=reopened)
        found.append({"peak_bytes": peak_bytes, "grown_bytes": watch.grown_bytes})
    print(json.dumps(found))


def _work(path: Path, budget: str, mib: int, *, reopened: bool) -> int:
    """Write, read, migrate and commit all over a store; return the account's peak."""
    n_pages = (mib << 20) // PAGE_BYTES
    rng = np.random.default_rng(int(reopened))
    open_store = Store.open if reopened else Store.create
    tiers = Budget(budget, nvme="20GiB", cold="20GiB")
    with open_store(path, tiers, migration=Migration()) as store:
        if not reopened:
            store.create_space("pages", dtype="uint8", row_width=PAGE_BYTES, n_rows=n_pages)
        space = store.space("pages")
        for first in range(0, n_pages, BATCH_PAGES):
            pages = np.arange(first, min(first + BATCH_PAGES, n_pages))
            with store.claim([(space, pages)], write=True) as claim:
                store.arena[claim.frames[0], :64] = rng.integers(0, 255)
            if first % (8 * BATCH_PAGES) == 0:
                store.commit()
        store.commit()
        for _ in range(n_pages // BATCH_PAGES):
            with store.claim([(space, np.unique(rng.integers(0, n_pages, BATCH_PAGES)))]):
                pass
        store.demote(space, np.arange(0, n_pages, 16))
        store.commit()
        store.scrub()
        return int(store.stats()["tiers"]["dram"]["peak_bytes"])


class _Watch:
    """Looks at the resident size of this process again and again."""

    def __enter__(self) -> _Watch:
        import psutil

        self._process = psutil.Process()
        self._begin_bytes = self._most_bytes = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.005):
            self._most_bytes = max(self._most_bytes, self._process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def grown_bytes(self) -> int:
        return self._most_bytes - self._begin_bytes


if __name__ == "__main__":
    raise SystemExit(main())
