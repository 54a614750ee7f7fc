"""Power cuts by the thousand: every image must reopen as a committed state, and go on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tiers.errors import NotAStoreError, StoreNotFoundError
from tiers.store import Store
from tiers.testing.fault_disk import FaultDisk
from tiers.testing.images import power_cut
from tiers.testing.model import State
from tiers.testing.workload import PATH, Recording, record

BUDGET_BYTES = 4 << 20
IMAGES_PER_RECORDING = 100
PAGE_BYTES = (4096, 8192, 4096, 65536)
"""Of successive recordings. With 4 KiB a slot is one block; larger ones are broken for nodes."""


class RecoveryError(AssertionError):
    """A store did not come back as it must.

    Attributes
    ----------
    seed, k, image : int
        `replay` makes the same image again.
    """

    def __init__(self, seed: int, k: int, image: int, reason: str) -> None:
        super().__init__(f"seed {seed}, k {k}, image {image}: {reason}")
        self.seed = seed
        self.k = k
        self.image = image


def check_images(seed: int, n_images: int) -> Iterator[RecoveryError | None]:
    """Record runs from `seed` on and check images of them; yield one outcome an image.

    Parameters
    ----------
    seed : int
        The first recording's; the next one has ``seed + 1``.
    n_images : int
        A hundred a recording.
    """
    for first in range(0, n_images, IMAGES_PER_RECORDING):
        recording = record_seed(seed)
        rng = np.random.default_rng(seed)
        for _ in range(min(IMAGES_PER_RECORDING, n_images - first)):
            k = int(rng.integers(len(recording.log.operations) + 1))
            image = int(rng.integers(1 << 32))
            try:
                check_image(recording, k, image)
            except RecoveryError as violation:
                yield violation
            else:
                yield None
        seed += 1


def record_seed(seed: int) -> Recording:
    """Return the recording that `check_images` makes of a seed."""
    return record(seed, page_bytes=PAGE_BYTES[seed % len(PAGE_BYTES)])


def replay(seed: int, k: int, image: int) -> None:
    """Check one image again, as a `RecoveryError` names it."""
    check_image(record_seed(seed), k, image)


def check_image(recording: Recording, k: int, image: int) -> None:
    """Check that the store in one image is what it may be, and that it can be used.

    Raises
    ------
    RecoveryError
    """
    disk = power_cut(recording.log, k, np.random.default_rng(image))
    allowed = recording.allowed(k)
    try:
        if allowed is None:
            _check_creation(disk, recording)
        else:
            _check_states(
                disk, [recording.states[number] for number in allowed], np.random.default_rng(image)
            )
    except Exception as failure:
        raise RecoveryError(
            recording.seed, k, image, f"{type(failure).__name__}: {failure}"
        ) from failure


def _check_creation(disk: FaultDisk, recording: Recording) -> None:
    """Before `create` returned there may be no store, but then one can be created."""
    try:
        store = Store.open(PATH, BUDGET_BYTES, disk=disk)
    except (StoreNotFoundError, NotAStoreError):
        if not disk.exists(PATH.parent):
            return
        store = Store.create(PATH, BUDGET_BYTES, page_size=recording.page_bytes, disk=disk)
    with store:
        _assert_is(store, State())
        store.check()


def _check_states(disk: FaultDisk, allowed: list[State], rng: np.random.Generator) -> None:
    with Store.open(PATH, BUDGET_BYTES, disk=disk) as store:
        differences = [state.difference(store) for state in allowed]
        assert None in differences, f"not a committed state: {differences}"
        state = allowed[differences.index(None)].copy()
        if rng.random() < 0.6:
            return
        store.check()
        state.meta = {"step": "after the cut"}
        if store.spaces:
            _write_some(store, state, rng)
        store.commit(meta=state.meta)
        store.check()
    with Store.open(PATH, BUDGET_BYTES, disk=disk) as store:
        _assert_is(store, state)


def _write_some(store: Store, state: State, rng: np.random.Generator) -> None:
    """Change pages of the first space, through every block that recovery may have thought free."""
    space = store.spaces[0]
    pages = np.arange(min(space.n_pages, 12))
    with store.claim([(space, pages)], write=True) as claim:
        for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
            content = rng.bytes(store.page_bytes)
            store.arena[frame] = np.frombuffer(content, np.uint8)
            state.pages[space.name, page] = content


def _assert_is(store: Store, state: State) -> None:
    difference = state.difference(store)
    assert difference is None, difference
