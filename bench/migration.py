"""What migration costs the foreground: latency on a virtual clock, throughput on a real one.

DRAM holds 15 % of the data and CXL memory (emulated) 15 %; claims of a few pages, a fifth of them
to write, follow a zipf distribution or a hot set that drifts.

On the virtual clock a store on a disk in memory runs the same claims with and without rounds of
migration. Claims arrive at given times whatever the store does; each transfer, sync and copy
between tiers moves the clock on by what a device would take. A claim that finds its pages in memory
waits for nobody; any other one waits until the step of a round that has the I/O lock ends, and goes
before the next step, as in a store with threads. The same seed gives the same figures on any
machine.

On the real clock two stores on files take turns with one reader each, one of them with its daemon;
printed are pages a second, and their ratio.

For example::

    python -m bench.migration                                  both, all streams
    python -m bench.migration --virtual --claims 20000         no clock of the machine's
    python -m bench.migration --real --mib 512 --rounds 9
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers import Budget, Migration, Store
from tiers.disk import Bytes, File
from tiers.memory import budget_min
from tiers.space import Space
from tiers.testing import FaultDisk

STREAMS = ("zipf", "drifting")
SHARE = 0.15
"""Of the data: DRAM, and CXL memory."""
ZIPF_EXPONENT = 0.99
HOT_SHARE, HOT_CHANCE = 0.1, 0.9
CLAIMS_A_DRIFT = 40
"""After so many claims the hot set has moved on by a page."""
PAGES_A_CLAIM = 4
WRITE_CHANCE = 0.2
CLAIMS_A_COMMIT = 500
PATH = Path("/machine/store")
PERCENTILES = (0.5, 0.9, 0.99, 0.999)

Pages = npt.NDArray[np.int64]


def claims_of(stream: str, n_pages: int, seed: int) -> Iterator[tuple[Pages, bool]]:
    """Yield what each claim asks for, and whether to write; endless and repeatable."""
    rng = np.random.default_rng(seed)
    place_of_rank = rng.permutation(n_pages)
    shares = np.cumsum(np.arange(1, n_pages + 1) ** -ZIPF_EXPONENT)
    n_hot = max(PAGES_A_CLAIM, int(HOT_SHARE * n_pages))
    number = 0
    while True:
        if stream == "zipf":
            ranks = np.searchsorted(shares, rng.random(PAGES_A_CLAIM) * shares[-1])
            pages = place_of_rank[ranks]
        else:
            hot = number // CLAIMS_A_DRIFT + rng.integers(0, n_hot, PAGES_A_CLAIM)
            is_hot = rng.random(PAGES_A_CLAIM) < HOT_CHANCE
            pages = np.where(is_hot, hot % n_pages, rng.integers(0, n_pages, PAGES_A_CLAIM))
        yield np.unique(pages).astype(np.int64), bool(rng.random() < WRITE_CHANCE)
        number += 1


def budget_of(n_pages: int, page_bytes: int) -> Budget:
    """Return a budget whose frames hold the shares of the data."""
    tier_bytes = int(SHARE * n_pages) * page_bytes
    # A 64th is held back for page tables.
    dram_bytes = (budget_min(page_bytes, cxl_bytes=tier_bytes) + tier_bytes) * 65 // 64
    return Budget(dram_bytes, cxl=tier_bytes)


# On a virtual clock


@dataclass(frozen=True)
class Device:
    """What things take.

    Attributes
    ----------
    read_us, write_us, sync_us : float
        Of a transfer alone; as many as are in flight take it together.
    read_bytes_per_us, write_bytes_per_us : float
    copy_bytes_per_us : float
        Between tiers of memory.
    page_us : float
        What the caller does with a page.
    """

    read_us: float = 80.0
    write_us: float = 30.0
    sync_us: float = 200.0
    read_bytes_per_us: float = 3000.0
    write_bytes_per_us: float = 2000.0
    copy_bytes_per_us: float = 8000.0
    page_us: float = 2.0


class TimedDisk(FaultDisk):
    """A disk in memory whose transfers take time on its virtual clock."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.make_directory(PATH.parent)

    def read_batch(
        self, file: File, offsets: Sequence[int], buffers: Sequence[Bytes], *, in_flight: int = 1
    ) -> None:
        super().read_batch(file, offsets, buffers, in_flight=in_flight)
        device = self.device
        self._take(buffers, in_flight, device.read_us, device.read_bytes_per_us)

    def write_batch(
        self, file: File, offsets: Sequence[int], buffers: Sequence[Bytes], *, in_flight: int = 1
    ) -> None:
        super().write_batch(file, offsets, buffers, in_flight=in_flight)
        device = self.device
        self._take(buffers, in_flight, device.write_us, device.write_bytes_per_us)

    def sync(self, file: File) -> None:
        super().sync(file)
        self.clock.advance(int(self.device.sync_us))

    def _take(
        self, buffers: Sequence[Bytes], in_flight: int, each_us: float, bytes_per_us: float
    ) -> None:
        size_bytes = sum(map(len, buffers))
        self.clock.advance(int(-(-len(buffers) // in_flight) * each_us + size_bytes / bytes_per_us))


@dataclass
class Figures:
    """What a run on the virtual clock found.

    Attributes
    ----------
    latencies_us : dict of str to float
        Of claims, by percentile.
    mean_us, seconds : float
    hits : float
        Share of pages that were found in memory.
    bytes_moved : int
        By rounds of migration.
    most_over_bytes : float
        By how much they passed the cap at most, what one round may do beyond it left out.
    """

    latencies_us: dict[str, float]
    mean_us: float
    seconds: float
    hits: float
    bytes_moved: int
    most_over_bytes: float


class VirtualRun:
    """One run: claims that arrive at given times, and rounds between them.

    Parameters
    ----------
    stream : str
    migration : Migration or None
        Without an interval; `interval_us` is what its thread would wait.
    n_claims : int
        Counted ones; half as many come before them.
    n_pages, page_bytes : int
    seed : int
    every_us : float
        Mean time between two arrivals.
    interval_us : int
    device : Device
    """

    def __init__(
        self,
        stream: str,
        migration: Migration | None,
        *,
        n_claims: int = 10_000,
        n_pages: int = 1000,
        page_bytes: int = 65536,
        seed: int = 0,
        every_us: float = 600.0,
        interval_us: int = 50_000,
        device: Device | None = None,
    ) -> None:
        self._disk = TimedDisk(device or Device())
        self._clock = self._disk.clock
        budget = budget_of(n_pages, page_bytes)
        self.store = Store.create(
            PATH, budget, page_size=page_bytes, migration=migration, disk=self._disk
        )
        self._space = _filled(self.store, n_pages)
        self._claims = claims_of(stream, n_pages, seed)
        rng = np.random.default_rng((seed, 1))
        self._n_before = n_claims // 2
        gaps = rng.exponential(every_us, n_claims + self._n_before)
        self._arrivals = (self._clock.now_us + np.cumsum(gaps)).astype(np.int64)
        self._next = 0
        self._idle_from = self._due_us = self._clock.now_us
        self._interval_us = interval_us
        self._taken_us: list[int] = []
        self._most_over_bytes = 0.0
        self._began_us = self._clock.now_us
        self._move, self.store._pager.move = self.store._pager.move, self._move_timed  # type: ignore[method-assign]
        # Where a round lets demands that wait go first, those that have arrived by then do.
        self.store._claims.wait_for_demands = self._serve_arrived  # type: ignore[method-assign]

    def run(self) -> Figures:
        """Serve all claims; return what they took."""
        with self.store:
            while self._next < len(self._arrivals):
                now_us = max(self._clock.now_us, int(self._arrivals[self._next]))
                if self.store.migrator is not None and self._due_us <= now_us:
                    self._tick()
                else:
                    self._serve()
            return self._figures()

    def _tick(self) -> None:
        migrator = self.store.migrator
        assert migrator is not None
        self._clock.advance(max(0, self._due_us - self._clock.now_us))
        migrator.tick(self._clock.now_us / 1e6)
        self._due_us = self._clock.now_us + self._interval_us
        parameters = migrator.parameters
        passed_s = (self._clock.now_us - self._began_us) / 1e6
        allowed_bytes = parameters.burst_bytes + parameters.bytes_per_s * passed_s
        self._most_over_bytes = max(self._most_over_bytes, migrator.bytes_moved - allowed_bytes)

    def _serve_arrived(self, most_s: float = 0.0) -> None:
        while self._next < len(self._arrivals) and (
            self._arrivals[self._next] <= self._clock.now_us
        ):
            self._serve()

    def _serve(self) -> None:
        """Serve the next claim, once it has arrived."""
        store, clock, space = self.store, self._clock, self._space
        pages, write = next(self._claims)
        arrived_us = int(self._arrivals[self._next])
        self._next += 1
        clock.advance(max(0, arrived_us - clock.now_us))
        waits_for_nobody = not write and bool(store.resident(space, pages).all())
        # One thread asks for all of them, one after the other.
        began_us = max(arrived_us, self._idle_from if waits_for_nobody else clock.now_us)
        at_us, emulated_ns = clock.now_us, store._pager.placement.emulated_ns
        with store.claim([(space, pages)], write=write) as claim:
            if write:
                store.arena[claim.frames[0], :8] = self._next & 255
            transfer_us = (store._pager.placement.emulated_ns - emulated_ns) / 1000
            clock.advance(int(len(pages) * self._disk.device.page_us + transfer_us))
        self._idle_from = began_us + clock.now_us - at_us
        if self._next > self._n_before:
            self._taken_us.append(self._idle_from - arrived_us)
        if self._next % CLAIMS_A_COMMIT == 0:
            # Whoever commits does not ask for pages meanwhile.
            at_us = clock.now_us
            store.commit()
            self._arrivals[self._next :] += clock.now_us - at_us

    def _move_timed(self, sources: Pages, targets: Pages) -> int:
        size_bytes = len(sources) * self.store.page_bytes
        self._clock.advance(int(size_bytes / self._disk.device.copy_bytes_per_us))
        return self._move(sources, targets)

    def _figures(self) -> Figures:
        counts = self.store._pager.counts
        migrator = self.store.migrator
        return Figures(
            {
                f"p{share * 100:g}": float(np.quantile(self._taken_us, share))
                for share in PERCENTILES
            },
            float(np.mean(self._taken_us)),
            (self._clock.now_us - self._began_us) / 1e6,
            counts["hits"] / (counts["hits"] + counts["misses"]),
            0 if migrator is None else migrator.bytes_moved,
            self._most_over_bytes,
        )


def virtual(stream: str, n_claims: int, seed: int) -> dict[str, Figures]:
    """Run the same claims with and without migration."""
    sides = {"without": None, "with": Migration(interval_s=None)}
    return {
        name: VirtualRun(stream, migration, n_claims=n_claims, seed=seed).run()
        for name, migration in sides.items()
    }


# On the real one


def real(
    stream: str, directory: Path, mib: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return pages a second of a reader, turn by turn, of stores with and without a daemon."""
    n_pages = (mib << 20) // 65536
    found: dict[str, list[float]] = {"without": [], "with": []}
    stores = {
        name: Store.create(
            directory / name, budget_of(n_pages, 65536), migration=Migration() if daemon else None
        )
        for name, daemon in (("without", False), ("with", True))
    }
    try:
        readers = {
            name: (store, _filled(store, n_pages), claims_of(stream, n_pages, 0))
            for name, store in stores.items()
        }
        for turn in range(rounds + 1):
            for name in list(readers)[:: 1 if turn % 2 else -1]:
                n_read, began = 0, time.perf_counter()
                store, space, claims = readers[name]
                while time.perf_counter() < began + seconds:
                    pages, _ = next(claims)
                    with store.claim([(space, pages)]) as claim:
                        n_read += int(store.arena[claim.frames[0], :8].any(axis=1).sum())
                if turn:  # memory is filled in the first one
                    found[name].append(n_read / (time.perf_counter() - began))
        migrator = stores["with"].migrator
        assert migrator is not None and migrator.failure is None
    finally:
        for store in stores.values():
            store.close()
    return found


def _filled(store: Store, n_pages: int) -> Space:
    """Return a space of a store in which every page is written and committed."""
    space = store.create_space("pages", dtype="uint8", row_width=store.page_bytes, n_rows=n_pages)
    for first in range(0, n_pages, 16):
        pages = np.arange(first, min(first + 16, n_pages))
        with store.claim([(space, pages)], write=True) as claim:
            store.arena[claim.frames[0]] = 1 + pages[:, None] % 251
    store.commit()
    return space


# Printing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--virtual", action="store_true", help="only the virtual clock")
    parser.add_argument("--real", action="store_true", help="only the real clock")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--claims", type=int, default=10_000, help="on the virtual clock")
    parser.add_argument("--seed", type=int, default=0, help="of the virtual runs")
    parser.add_argument("--mib", type=int, default=256, help="of data, on the real clock")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each store")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--directory", type=Path, help="where the stores are to stand")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    if min(asked.claims, asked.mib, asked.rounds, asked.seconds) <= 0:
        parser.error("--claims, --mib, --rounds and --seconds are more than 0")
    found: dict[str, Any] = {"virtual": {}, "real": {}}
    for stream in asked.streams:
        if not asked.real:
            sides = virtual(stream, asked.claims, asked.seed)
            found["virtual"][stream] = {name: asdict(side) for name, side in sides.items()}
            if not asked.json:
                _print_virtual(stream, sides)
        if not asked.virtual:
            directory = Path(tempfile.mkdtemp(prefix="migration-", dir=asked.directory))
            try:
                turns = real(stream, directory, asked.mib, asked.rounds, asked.seconds)
            finally:
                shutil.rmtree(directory)
            found["real"][stream] = turns
            if not asked.json:
                _print_real(stream, turns)
    if asked.json:
        print(json.dumps(found))
    return 0


def _print_virtual(stream: str, sides: dict[str, Figures]) -> None:
    print(f"{stream}, virtual clock, us")
    for name, side in sides.items():
        taken = "  ".join(f"{key} {us:8.0f}" for key, us in side.latencies_us.items())
        print(
            f"  {name:<8} mean {side.mean_us:7.0f}  {taken}  hits {side.hits:.3f}  "
            f"moved {side.bytes_moved / side.seconds / 1e6:.0f} MB/s"
        )
    before, after = (side.latencies_us["p99"] for side in sides.values())
    print(f"  p99 with migration is {after / before:.3f} of p99 without; 1.1 is wanted at most")


def _print_real(stream: str, turns: dict[str, list[float]]) -> None:
    print(f"{stream}, real clock, pages a second, median of {len(turns['with'])} turns")
    for name, rates in turns.items():
        print(f"  {name:<8} {np.median(rates):9.0f}  ({min(rates):.0f} to {max(rates):.0f})")
    ratio = np.median(turns["with"]) / np.median(turns["without"])
    print(f"  with the daemon it is {ratio:.3f} of without; 0.8 is wanted at least")


if __name__ == "__main__":
    raise SystemExit(main())
