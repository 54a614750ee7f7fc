"""Corrupt bytes that the newest root reaches, then read everything: right, or a typed error.

::

    python -m tiers.testing corruptions --count 100000 --seed 0   # --jobs N; one process a core
    python -m tiers.testing corruptions --replay SEED NUMBER      # one again

Each takes a copy of a small store (`tiers.testing.specimen`) that has several spaces, one of them
hashed, snapshots, spaces that were dropped, and packs, changes one to four places of it, and then

1. opens it to read, and reads every page of the newest state and of every snapshot;
2. opens it to write, reads every page again, and calls `check`, which must find what is damaged;

A page on the way to which nothing is damaged must read right, whatever else is; any other one is
claimed together with others and alone, and reads right or is refused.

3. one time in eight: writes pages, commits, opens it again and reads everything;
4. one time in twenty: scrubs it, which must find what is damaged, too;
5. one time in fifty: salvages it, and reads what was saved.

Memory that a process may map is limited, and so is the time for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
from rich.console import Console

from tiers.allocator import BLOCK_BYTES
from tiers.errors import TierError
from tiers.requests import Request
from tiers.root import ROOT_FILE_BYTES
from tiers.salvage import salvage
from tiers.space import Space
from tiers.store import Store
from tiers.testing.fault_disk import FaultDisk
from tiers.testing.model import State, read_page
from tiers.testing.processes import in_processes
from tiers.testing.runs import (
    HungError,
    Outcome,
    ViolationError,
    limit_memory,
    n_cores,
    not_longer_than,
    parser_of,
    run,
)
from tiers.testing.specimen import (
    CRC_BYTES,
    REGIONS,
    ROOT_PATH,
    Part,
    Region,
    Specimen,
    is_copy_of,
    specimen,
)
from tiers.testing.workload import PATH

A_SPECIMEN = 300
"""Corruptions of one store; then the next one is made."""
PLACES_MAX = 4
CHANCES = (0.09, 0.03, 0.25, 0.05, 0.10, 0.23, 0.06, 0.10, 0.05, 0.04)
"""Of each region of `REGIONS` to be struck."""
UNREAD: tuple[Region, ...] = ("root", "header", "tags", "pack ids")
"""What no check of a store that is open reads."""
SORTS = ("bit", "byte", "zeros", "noise", "duplicate", "swap", "stale", "torn")
SECTOR_BYTES = 512
SECONDS_MAX = 60.0
MORE_MEMORY_BYTES = 1 << 30
SALVAGED = PATH.parent / "salvaged"
DEEP_PAGES_READ = 4


def corruptions(seed: int, count: int, jobs: int = 1) -> Generator[Outcome, None, None]:
    """Corrupt stores in `count` ways; yield one outcome for each.

    Parameters
    ----------
    seed : int
        Of the first store; the next one has ``seed + 1``. `A_SPECIMEN` corruptions a store.
    count : int
    jobs : int
        Processes; with 1 everything happens in this one, and its memory is not limited. Outcomes
        are the same whatever it is.
    """
    parts = [
        (seed + number, min(A_SPECIMEN, count - first))
        for number, first in enumerate(range(0, count, A_SPECIMEN))
    ]
    if jobs == 1:
        for part in parts:
            yield from corrupt_one_store(*part)
    else:
        yield from in_processes(_corrupt_with_less_memory, parts, jobs)


def _corrupt_with_less_memory(seed: int, count: int) -> Iterator[Outcome]:
    specimen(seed)  # whatever is compiled or loaded once
    limit_memory(MORE_MEMORY_BYTES)
    return corrupt_one_store(seed, count)


def corrupt_one_store(seed: int, count: int) -> Iterator[Outcome]:
    """Corrupt one store in `count` ways, each from the same beginning."""
    for number in range(count):
        outcome = Outcome()
        try:
            with not_longer_than(SECONDS_MAX):
                corrupt(seed, number, outcome.counts)
        except (Exception, HungError) as failure:
            outcome.violation = ViolationError(
                f"corruptions --replay {seed} {number}", f"{type(failure).__name__}: {failure}"
            )
        yield outcome


@lru_cache(maxsize=1)
def _specimen(seed: int) -> Specimen:
    return specimen(seed)


def corrupt(seed: int, number: int, counts: Counter[str]) -> None:
    """Make one corruption and look at everything.

    Parameters
    ----------
    seed, number : int
        Which store, and which of its corruptions.
    counts : Counter
        Told what was struck, how, and what came of it.

    Raises
    ------
    AssertionError
        If bytes are wrong, or damage was not found.
    Exception
        Whatever a store raises that is no `TierError`.
    """
    _Corruption(_specimen(seed), np.random.default_rng((seed, number)), counts).run()


class _Corruption:
    def __init__(self, made: Specimen, rng: np.random.Generator, counts: Counter[str]) -> None:
        self.made = made
        self.rng = rng
        self.counts = counts
        self.struck: set[Part] = set()
        self._has_gone_on = False
        self.is_together = bool(rng.random() < 0.5)
        self.blocks: dict[tuple[Path, int], bytearray] = {}

    def run(self) -> None:
        n_places = 1 if self.rng.random() < 0.6 else int(self.rng.integers(2, PLACES_MAX + 1))
        for _ in range(n_places):
            while not self._strike():
                pass
        self.counts[f"of {n_places} places"] += 1
        results = {self._look(self._disk(), read_only=True), self._look(self._disk())}
        if self.rng.random() < 1 / 8:
            self._go_on()
        if self.rng.random() < 1 / 20:
            self._scrub()
        if self.rng.random() < 1 / 50:
            self._salvage()
        (worst,) = sorted(results)[-1:]
        self.counts[f"outcome: {worst[1]}"] += 1

    def _disk(self) -> FaultDisk:
        disk = self.made.disk.twin()
        for (path, offset), content in self.blocks.items():
            disk.put(path, offset, bytes(content))
        return disk

    # Corrupting

    def _strike(self) -> bool:
        """Change one place; return whether any byte that the root reaches is another one now."""
        region = REGIONS[self.rng.choice(len(REGIONS), p=CHANCES)]
        part = self._choose(region)
        sort = str(self.rng.choice(SORTS))
        before = {place: bytes(content) for place, content in self.blocks.items()}
        getattr(self, f"_{sort}")(part)
        after = {place: bytes(content) for place, content in self.blocks.items()}
        if all(before.get(place, self._original(*place)) == after[place] for place in after):
            return False
        self.struck = self._parts_changed()
        self.counts[f"struck: {region}"] += 1
        self.counts[f"by: {sort}"] += 1
        return True

    def _choose(self, region: Region) -> Part:
        parts = self.made.parts[region]
        return parts[self.rng.integers(len(parts))]

    def _parts_changed(self) -> set[Part]:
        struck = {part for path, offset in self.blocks for part in self.made.parts_at[path, offset]}
        return {part for part in struck if self._bytes(part) != self._as_made(part)}

    def _as_made(self, part: Part) -> bytes:
        return self.made.files[part.path][part.offset : part.offset + part.size_bytes]

    def _original(self, path: Path, offset: int) -> bytes:
        return self.made.files[path][offset : offset + BLOCK_BYTES]

    def _block(self, path: Path, offset: int) -> bytes:
        return bytes(self.blocks.get((path, offset)) or self._original(path, offset))

    def _bytes(self, part: Part) -> bytes:
        first, start = part.offset // BLOCK_BYTES * BLOCK_BYTES, part.offset % BLOCK_BYTES
        stop = part.offset + part.size_bytes
        whole = b"".join(self._block(part.path, at) for at in range(first, stop, BLOCK_BYTES))
        return whole[start : start + part.size_bytes]

    def _put(self, part: Part, content: bytes, start: int = 0) -> None:
        """Put bytes into a part from `start` on, as far as it goes."""
        content = content[: part.size_bytes - start]
        at = part.offset + start
        while content:
            offset, within = at // BLOCK_BYTES * BLOCK_BYTES, at % BLOCK_BYTES
            step = min(BLOCK_BYTES - within, len(content))
            key = (part.path, offset)
            block = self.blocks.setdefault(key, bytearray(self._original(*key)))
            block[within : within + step] = content[:step]
            content, at = content[step:], at + step

    def _bit(self, part: Part) -> None:
        place, bit = int(self.rng.integers(part.size_bytes)), int(self.rng.integers(8))
        self._put(part, bytes([self._bytes(part)[place] ^ 1 << bit]), place)

    def _byte(self, part: Part) -> None:
        self._put(part, self.rng.bytes(1), int(self.rng.integers(part.size_bytes)))

    def _zeros(self, part: Part) -> None:
        self._put(part, bytes(self._stretch_bytes(part)))

    def _noise(self, part: Part) -> None:
        self._put(part, self.rng.bytes(self._stretch_bytes(part)))

    def _duplicate(self, part: Part) -> None:
        self._put(part, self._bytes(self._another(part)))

    def _swap(self, part: Part) -> None:
        other = self._another(part)
        mine, theirs = self._bytes(part), self._bytes(other)
        self._put(part, theirs)
        self._put(other, mine)

    def _stale(self, part: Part) -> None:
        """Make it what was there before it was last written, of one block or of all."""
        for start in range(0, part.size_bytes, BLOCK_BYTES):
            if start == 0 or self.rng.random() < 0.5:
                self._put(part, self._past(part, start), start)

    def _torn(self, part: Part) -> None:
        """Leave sectors of what was there before, from one end or anywhere."""
        n_sectors = max(1, part.size_bytes // SECTOR_BYTES)
        is_old = self.rng.random(n_sectors) < 0.5
        if self.rng.random() < 0.5:
            is_old = np.sort(is_old)
        old = b"".join(self._past(part, start) for start in range(0, part.size_bytes, BLOCK_BYTES))
        for sector in np.flatnonzero(is_old).tolist():
            first = sector * SECTOR_BYTES
            self._put(part, old[first : first + SECTOR_BYTES], first)

    def _stretch_bytes(self, part: Part) -> int:
        return min(part.size_bytes, BLOCK_BYTES) if self.rng.random() < 0.5 else part.size_bytes

    def _another(self, part: Part) -> Part:
        """Return a part of the same region, or sometimes of any."""
        if self.rng.random() < 0.7:
            return self._choose(part.region)
        return self._choose(REGIONS[self.rng.integers(len(REGIONS))])

    def _past(self, part: Part, start: int) -> bytes:
        """Return what 4 KiB of a part were once, or what another part once was, or zeros."""
        past = self.made.past
        held = past.get((part.path, (part.offset + start) // BLOCK_BYTES * BLOCK_BYTES))
        if not held:
            held = list(past.values())[self.rng.integers(len(past))] or [bytes(BLOCK_BYTES)]
        return held[self.rng.integers(len(held))]

    # Looking

    def _allowed(self) -> set[int]:
        """Return the commits that may be found: the newest, unless every copy of it is gone.

        One block that is changed cannot do that, whatever is in the others.
        """
        if sum(path == ROOT_PATH for path, _ in self.blocks) < 2:
            return {self.made.commit}
        copies = (self._block(ROOT_PATH, i) for i in range(0, ROOT_FILE_BYTES, BLOCK_BYTES))
        if any(is_copy_of(copy, self.made.commit) for copy in copies):
            return {self.made.commit}
        return set(self.made.states)

    @property
    def _is_damaged(self) -> bool:
        """Whether anything is damaged that a check of the newest state reads."""
        return any(
            part.region not in UNREAD and not self._is_another_index(part) for part in self.struck
        )

    def _is_another_index(self, part: Part) -> bool:
        """Return whether this is a whole index of another pack, which has the same pages there."""
        if part.region != "pack indices":
            return False
        now, made = (raw[:-CRC_BYTES] for raw in (self._bytes(part), self._as_made(part)))
        if google_crc32c.value(now) != int.from_bytes(self._bytes(part)[-CRC_BYTES:], "little"):
            return False
        offsets = [one.offset for one in self.made.parts["packed pages"] if one.path == part.path]
        spans, spans_made = (np.frombuffer(raw, "<u8").reshape(-1, 2) for raw in (now, made))
        is_reached = np.isin(spans_made[:, 0], offsets)
        return bool((spans == spans_made)[is_reached].all())

    def _open(self, disk: FaultDisk, **options: object) -> Store:
        return Store.open(PATH, self.made.budget_bytes, disk=disk, **options)  # type: ignore[arg-type]

    def _look(self, disk: FaultDisk, *, read_only: bool = False) -> tuple[int, str]:
        """Open a store and read all of it; return how bad it is, and that in words."""
        try:
            store = self._open(disk, read_only=read_only)
        except TierError as refused:
            return 3, f"refused at open, {type(refused).__name__}"
        with store:
            state = self._state_of(store)
            is_right = self._read(store, state)
            if read_only:
                for name, expected in state.snapshots.items():
                    is_right &= self._read_snapshot(disk, name, expected)
            else:
                is_right &= self._check(store)
            if store.commit_number != self.made.commit:
                return 2, "an earlier commit, every copy of the newest root is gone"
        return (0, "everything read right") if is_right else (1, "some of it refused")

    def _state_of(self, store: Store) -> State:
        number = store.commit_number
        assert number in self._allowed(), f"commit {number} came back, not {self.made.commit}"
        state = self.made.states[number]
        assert store.meta == state.meta, "another meta"
        assert {space.name: space.spec for space in store.spaces} == state.specs, "other spaces"
        assert list(store.snapshots) == list(state.snapshots), "other snapshots"
        for space in store.spaces:
            assert store.n_allocated(space) == state.allocated.get(space.name, 0)
        return state

    def _read_snapshot(self, disk: FaultDisk, name: str, expected: State) -> bool:
        try:
            reader = self._open(disk.process(), read_only=True, snapshot=name)
        except TierError:
            return False
        with reader:
            return self._read(reader, expected)

    def _read(self, store: Store, state: State) -> bool:
        """Read every page, right or refused; return whether all were right."""
        results = [self._read_batch(store, state, batch) for batch in self._batches(store, state)]
        return all(results)

    def _batches(self, store: Store, state: State) -> Iterator[list[Request]]:
        """Yield all pages, as many at once as there are frames for; or space by space."""
        batch: list[Request] = []
        n_left = store.n_frames
        for space in store.spaces:
            pages = _pages_to_read(space, state)
            while len(pages):
                if batch and (n_left == 0 or not self.is_together):
                    yield batch
                    batch, n_left = [], store.n_frames
                batch.append((space, pages[:n_left]))
                pages = pages[n_left:]
                n_left -= len(batch[-1][1])
        if batch:
            yield batch

    def _read_batch(self, store: Store, state: State, batch: list[Request]) -> bool:
        right = partial(_one_of, state, store)
        try:
            self._compare(store, batch, right)
        except TierError:
            pass
        else:
            return True
        # What is whole, of a commit whose every block is known, must not suffer from the rest.
        is_known = store.commit_number in self.made.placed and not self._has_gone_on
        whole, others = [], []
        for space, pages in batch:
            is_whole = np.array([is_known and self._is_whole(store, space, page) for page in pages])
            if is_whole.any():
                whole.append((space, pages[is_whole]))
            others += [(space, pages[i : i + 1]) for i in np.flatnonzero(~is_whole).tolist()]
        assert others, "nothing is damaged, and yet it is refused"
        if whole:
            self._compare(store, whole, right)
        for request in others:
            with suppress(TierError):
                self._compare(store, [request], right)
        return False

    def _is_whole(self, store: Store, space: Space, page: int) -> bool:
        """Return whether nothing on the way to a page is damaged."""
        way = self.made.way_to(store.commit_number, space.number, int(page))
        return self.struck.isdisjoint(way)

    def _compare(
        self, store: Store, batch: list[Request], right: Callable[[str, int], set[bytes]]
    ) -> None:
        with store.claim(batch) as claim:
            for (space, pages), frames in zip(batch, claim.frames, strict=True):
                for page, frame in zip(pages.tolist(), frames.tolist(), strict=True):
                    assert store.arena[frame].tobytes() in right(space.name, page), (
                        f"page {page} of {space.name!r} has other bytes"
                    )

    def _check(self, store: Store) -> bool:
        try:
            store.check()
        except TierError:
            return False
        is_newest = store.commit_number == self.made.commit
        assert not (is_newest and self._is_damaged), "the check found nothing"
        return True

    def _go_on(self) -> None:
        """Write and commit on top of it: what is right stays right, and what is not is refused."""
        disk = self._disk()
        try:
            with self._open(disk) as store:
                state = self._state_of(store).copy()
                written = self._write_and_commit(store, state)
        except TierError:
            written = None
        if written is None:
            self.counts["went on: refused"] += 1
            return
        disk.power_off()
        # Where an earlier commit came back, the new one has the number of one that is known.
        self._has_gone_on = True
        # The root is anew whole, so this cannot be refused but for what was damaged before.
        try:
            store = self._open(disk)
        except TierError:
            self.counts["went on: refused when opened again"] += 1
            return
        with store:
            assert store.meta == written.meta, "a commit was lost"
            is_right = self._read(store, written)
        self.counts[f"went on: {'all right' if is_right else 'some of it refused'}"] += 1

    def _write_and_commit(self, store: Store, state: State) -> State | None:
        for space in store.spaces:
            pages = _pages_to_read(space, state)
            chosen = np.sort(self.rng.choice(pages, min(4, len(pages)), replace=False))
            try:
                claim = store.claim([(space, chosen)], write=True)
            except TierError:
                store.abort()
                return None
            with claim:
                for page, frame in zip(chosen.tolist(), claim.frames[0].tolist(), strict=True):
                    content = self.rng.bytes(store.page_bytes)
                    store.arena[frame] = np.frombuffer(content, np.uint8)
                    state.pages[space.name, page] = content
        state.meta = {"went": "on"}
        store.commit(meta=state.meta)
        return state

    def _scrub(self) -> None:
        try:
            with self._open(self._disk(), read_only=True) as store:
                is_newest = store.commit_number == self.made.commit
                found = store.scrub()
        except TierError:
            self.counts["scrubbed: refused"] += 1
            return
        is_found = bool(found.damaged)
        if is_newest:
            assert is_found == self._is_damaged, f"the scrub found {found.damaged}"
        self.counts[f"scrubbed: {'damage found' if is_found else 'nothing damaged'}"] += 1

    def _salvage(self) -> None:
        """Salvage: whatever it gives back was committed once."""
        disk = self._disk()
        try:
            salvage(PATH, SALVAGED, budget=self.made.budget_bytes, disk=disk)
        except TierError:
            self.counts["salvaged: refused"] += 1
            return
        with Store.open(SALVAGED, self.made.budget_bytes, disk=disk) as store:
            for space in store.spaces:
                newest = self.made.newest
                if space.name not in newest.specs:
                    continue  # of an earlier root
                pages = _pages_to_read(space, newest)
                for first in range(0, len(pages), store.n_frames):
                    some = pages[first : first + store.n_frames]
                    self._compare(store, [(space, some)], partial(self._ever, store))
        self.counts["salvaged"] += 1

    def _ever(self, store: Store, name: str, page: int) -> set[bytes]:
        unwritten = State(self.made.newest.specs)
        return self.made.contents(name, page) | _one_of(unwritten, store, name, page)


def _one_of(state: State, store: Store, name: str, page: int) -> set[bytes]:
    return {read_page(state, name, page, store.page_bytes)}


def _pages_to_read(space: Space, state: State) -> npt.NDArray[np.int64]:
    """Return every page of a small space; of another one what was written, and some others."""
    if space.n_pages <= 24:
        return np.arange(space.n_pages)
    written = [page for name, page in state.pages if name == space.name]
    some = range(0, space.n_pages, space.n_pages // DEEP_PAGES_READ)
    return np.unique(np.array([*written, *some], np.int64))


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m tiers.testing corruptions``."""
    parser = parser_of("corruptions", __doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first store")
    parser.add_argument("--jobs", type=int, default=n_cores(), help="processes; one a core")
    parser.add_argument("--replay", type=int, nargs=2, metavar=("SEED", "NUMBER"))
    options = parser.parse_args(arguments)
    if options.count < 0 or options.jobs < 1:
        parser.error("--count is 0 or more, and --jobs 1 or more")
    console = Console()
    if options.replay is not None:
        counts: Counter[str] = Counter()
        try:
            corrupt(options.replay[0], options.replay[1], counts)
        except Exception:
            console.print_exception()
            return 1
        finally:
            console.print(*sorted(counts), sep="\n", markup=False)
        return 0
    outcomes = corruptions(options.seed, options.count, options.jobs)
    return run(console, "corruptions", outcomes, options.count)
