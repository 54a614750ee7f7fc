"""Power cuts by the million: every image must reopen as a committed state, and go on."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from tiers.errors import NotAStoreError, StoreNotFoundError
from tiers.store import Store
from tiers.testing.fault_disk import FaultDisk
from tiers.testing.footprint import KnownImages
from tiers.testing.images import PowerCuts
from tiers.testing.log import Log, Names, Resize, Sync, SyncDirectory
from tiers.testing.model import State
from tiers.testing.processes import in_processes
from tiers.testing.workload import PATH, Recording, record

BUDGET_BYTES = 3 << 19
IMAGES_PER_RECORDING = 400
PAGE_BYTES = (4096, 8192, 4096, 65536)
"""Of successive recordings. With 4 KiB a slot is one block; larger ones are broken for nodes."""
TURNS_SHARE = 0.5
"""Of the images: cut before syncs and after names or lengths have changed; others anywhere."""
USED_SHARE = 0.05
"""Of the images: opened and read, known or not, and checked, written to, committed and reopened."""


class RecoveryError(AssertionError):
    """A store did not come back as it must; the message says how to see it again.

    Attributes
    ----------
    seed, k, image : int
        `replay` makes the same image again.
    reason : str
    """

    def __init__(self, seed: int, k: int, image: int, reason: str) -> None:
        super().__init__(
            f"seed {seed}, k {k}, image {image}: {reason}\n"
            f"again: python -m tiers.testing --replay {seed} {k} {image}"
        )
        self.seed = seed
        self.k = k
        self.image = image
        self.reason = reason

    def __reduce__(self) -> tuple[type[RecoveryError], tuple[int, int, int, str]]:
        return RecoveryError, (self.seed, self.k, self.image, self.reason)


class Outcome(NamedTuple):
    """What became of one image.

    Attributes
    ----------
    is_distinct : bool
        Whether what a store reads of it, names included, is in no earlier image of its recording.
    is_opened : bool
        Distinct ones are opened and read whole, and of the others those that are also used. What a
        store would find in the rest was found in an earlier one; see `tiers.testing.footprint`.
    violation : RecoveryError or None
    """

    is_distinct: bool
    is_opened: bool
    violation: RecoveryError | None = None


def check_images(seed: int, n_images: int | None, jobs: int = 1) -> Generator[Outcome, None, None]:
    """Record runs from `seed` on and check images of them; yield one outcome an image.

    Parameters
    ----------
    seed : int
        The first recording's; the next one has ``seed + 1``.
    n_images : int or None
        `IMAGES_PER_RECORDING` a recording; None goes on until the generator is closed.
    jobs : int
        Processes that share the recordings; with 1 everything happens in this one. Images and the
        order of their outcomes are the same whatever it is.

    Raises
    ------
    ValueError
        If `n_images` is negative, or `jobs` not positive.
    """
    if (n_images is not None and n_images < 0) or jobs < 1:
        raise ValueError(f"n_images is 0 or more and jobs 1 or more, not {n_images} and {jobs}")
    sizes = repeat(IMAGES_PER_RECORDING) if n_images is None else _parts_of(n_images)
    parts = ((seed + number, size) for number, size in enumerate(sizes))
    if jobs == 1 or (n_images is not None and n_images <= IMAGES_PER_RECORDING):
        for part in parts:
            yield from check_recording(*part)
    else:
        yield from in_processes(check_recording, parts, jobs)


def _parts_of(n_images: int) -> Iterator[int]:
    for first in range(0, n_images, IMAGES_PER_RECORDING):
        yield min(IMAGES_PER_RECORDING, n_images - first)


def check_recording(seed: int, n_images: int) -> Iterator[Outcome]:
    """Record one run and check images of it; yield one outcome an image.

    A run that fails by itself is one violation, and has no images.
    """
    try:
        check = RecoveryCheck(record_seed(seed))
    except Exception as failure:
        violation = RecoveryError(
            seed, 0, 0, f"the run that was to be recorded failed: {failure!r}"
        )
        yield Outcome(is_distinct=False, is_opened=False, violation=violation)
        return
    length = len(check.recording.log.operations)
    turns = _turns(check.recording.log)
    rng = np.random.default_rng(seed)
    for _ in range(n_images):
        is_at_turn = rng.random() < TURNS_SHARE
        k = int(rng.choice(turns) if is_at_turn else rng.integers(length + 1))
        image = int(rng.integers(1 << 32))
        try:
            yield check(k, image)
        except RecoveryError as violation:
            yield Outcome(is_distinct=True, is_opened=True, violation=violation)


def _turns(log: Log) -> list[int]:
    """Return where most is in doubt, before syncs, and right after names and lengths have changed.

    What must not be done too early is done there, and few of the operations are such.
    """
    turns = []
    for position, operation in enumerate(log.operations):
        if isinstance(operation, Sync | SyncDirectory):
            turns.append(position)
        elif isinstance(operation, Names | Resize):
            turns += [position + 1, min(position + 2, len(log.operations))]
    return turns


def record_seed(seed: int) -> Recording:
    """Return the recording that `check_images` makes of a seed."""
    return record(seed, page_bytes=PAGE_BYTES[seed % len(PAGE_BYTES)])


def replay(seed: int, k: int, image: int) -> None:
    """Check one image again, as a `RecoveryError` names it."""
    check_image(record_seed(seed), k, image)


def check_image(recording: Recording, k: int, image: int) -> None:
    """Check that the store in one image is what it may be, and that it can be used.

    Parameters
    ----------
    recording : Recording
    k : int
        Operations of its log before the power cut.
    image : int
        Chooses what survived it.

    Raises
    ------
    RecoveryError
    """
    RecoveryCheck(recording)(k, image)


class RecoveryCheck:
    """Checks images of one recording: `check_image` for many of them.

    Parameters
    ----------
    recording : Recording
        Complete: what is added to its log later is not seen.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._cuts = PowerCuts(recording.log)
        self._known = KnownImages()

    def __call__(self, k: int, image: int) -> Outcome:
        """Check one image, as `check_image` does, unless what can be read of it is known.

        One in twenty is opened and used in any case: checked, written to, reopened, read whole.
        """
        recording = self.recording
        remains = self._cuts.remains(self._cuts.choose(k, np.random.default_rng(image)))
        rng = np.random.default_rng(image)
        allowed = recording.allowed(k)
        is_used = allowed is not None and rng.random() < USED_SHARE
        findings = self._known.findings(remains, [None] if allowed is None else allowed)
        is_known = bool(findings)
        if is_known and not is_used:
            return Outcome(is_distinct=False, is_opened=False)
        disk = remains.disk()
        try:
            looks = disk.watch()
            if allowed is None:
                self._check_creation(disk)
                self._known.add(remains, looks, None)
            else:
                with Store.open(PATH, BUDGET_BYTES, disk=disk) as store:
                    known = [number for number in allowed if number in findings]
                    number = known[0] if known else self._number_of(store, allowed)
                    disk.unwatch()
                    if is_used:
                        state = recording.states[number].copy()
                        _use(store, state, rng)
                if not is_known:
                    self._known.add(remains, looks, number)
                if is_used:
                    _use_again(state, disk, rng)
        except Exception as failure:
            raise RecoveryError(
                recording.seed, k, image, f"{type(failure).__name__}: {failure}"
            ) from failure
        return Outcome(is_distinct=not is_known, is_opened=True)

    def _check_creation(self, disk: FaultDisk) -> None:
        """Before `create` returned there may be no store, but then one can be created."""
        try:
            store = Store.open(PATH, BUDGET_BYTES, disk=disk)
        except (StoreNotFoundError, NotAStoreError):
            if not disk.exists(PATH.parent):
                return
            page_bytes = self.recording.page_bytes
            store = Store.create(PATH, BUDGET_BYTES, page_size=page_bytes, disk=disk)
        with store:
            _assert_is(store, State())
            store.check()

    def _number_of(self, store: Store, allowed: Sequence[int]) -> int:
        """Return the first of the recorded states that a store, read whole, is in."""
        differences = []
        for number in allowed:
            difference = self.recording.states[number].difference(store)
            if difference is None:
                return number
            differences.append(difference)
        raise AssertionError(f"not a committed state: {differences}")


def _use(store: Store, state: State, rng: np.random.Generator) -> None:
    """Check the store, write some pages and commit."""
    store.check()
    state.meta = {"step": "after the cut"}
    if store.spaces:
        if store.stats()["tiers"]["cold"]["used_bytes"]:
            _move_some(store, rng)
        _write_some(store, state, rng)
    store.commit(meta=state.meta)
    store.check()


def _use_again(state: State, disk: FaultDisk, rng: np.random.Generator) -> None:
    """Open the store once more, read it whole, and use its snapshots."""
    with Store.open(PATH, BUDGET_BYTES, disk=disk) as store:
        _assert_is(store, state)
        if state.snapshots:
            _use_snapshots(store, state, disk, rng)


def _move_some(store: Store, rng: np.random.Generator) -> None:
    """Move pages to the cold tier and back, over packs that recovery may have thought dead."""
    for space in store.spaces:
        for pages in store.stored_pages(space):
            store.promote(space, pages[rng.random(len(pages)) < 0.2])
            store.demote(space, pages[rng.random(len(pages)) < 0.2])


def _write_some(store: Store, state: State, rng: np.random.Generator) -> None:
    """Change pages of the first space, through every block that recovery may have thought free."""
    space = store.spaces[0]
    pages = np.arange(min(space.n_pages, 12))
    with store.claim([(space, pages)], write=True) as claim:
        for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
            content = rng.bytes(store.page_bytes)
            store.arena[frame] = np.frombuffer(content, np.uint8)
            state.pages[space.name, page] = content


def _use_snapshots(store: Store, state: State, disk: FaultDisk, rng: np.random.Generator) -> None:
    """Read every snapshot beside the writer; then drop one or go back to it."""
    for name, expected in state.snapshots.items():
        with Store.open(
            PATH, BUDGET_BYTES, read_only=True, snapshot=name, disk=disk.process()
        ) as reader:
            _assert_is(reader, expected)
    name = str(rng.choice(list(state.snapshots)))
    if rng.random() < 0.5:
        store.snapshots.drop(name)
        state = state.without_snapshot(name)
    else:
        store.snapshots.roll_back(name, drop_newer=True)
        state = state.rolled_back(name)
    _assert_is(store, state)
    store.check()


def _assert_is(store: Store, state: State) -> None:
    difference = state.difference(store)
    assert difference is None, difference
