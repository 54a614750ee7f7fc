"""Watermarks: how many pages migration moves, from counts alone.

Strategy only: pure functions of what the caller counted. `tiers.migration` does what they say.

::

    frames of a tier   |<------------- mapped ------------->|<- free ->|
                                                     high ->|     |<- low

Fewer free frames than `low`: pages give way until `high` are free. The two differ so that a demand
for one page does not set off a move of one page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiers.errors import TierError

Counts = npt.NDArray[np.integer]


class MigrationError(TierError, ValueError):
    """A parameter of migration is refused."""


@dataclass(frozen=True)
class Migration:
    """What a store moves ahead of demand, and how much of it.

    Parameters
    ----------
    interval_s : float or None
        Time between two rounds of the store's own thread; with None there is no thread, and
        `Store.migrator` is ticked by whoever opened the store.
    low, high : float
        Shares of the frames of a tier: with fewer than `low` free, pages give way until `high` are.
    bytes_per_s : float
        Most bytes that are copied between tiers or written ahead, on the clock of the ticks.
    burst_bytes : int
        Most of them at once, after a rest.
    pages_max : int
        Most pages of one kind of move in a round.
    touches_min : int
        A page of CXL memory may be promoted after so many batches used it there. The one that
        brought it into memory came before, so 1 is its second touch at the earliest.
    rest_rounds : int
        A page that moved stays so many rounds.
    memory : float
        Half of each page's touches are forgotten after so many accesses for each frame of DRAM.
    nvme_low, nvme_high : float
        Shares of the NVMe budget: with more than `nvme_high` of it used, pages become cold until
        `nvme_low` are. Needs a `Budget` with `nvme` and `cold`.

    Raises
    ------
    MigrationError
        If a value is refused, naming it.
    """

    interval_s: float | None = 0.05
    low: float = 0.01
    high: float = 0.02
    bytes_per_s: float = 512e6
    burst_bytes: int = 64 << 20
    pages_max: int = 64
    touches_min: int = 1
    rest_rounds: int = 1
    memory: float = 1.0
    nvme_low: float = 0.8
    nvme_high: float = 0.9

    def __post_init__(self) -> None:
        for name in ("pages_max", "burst_bytes", "touches_min", "rest_rounds"):
            value = getattr(self, name)
            if type(value) is not int or value < (name != "rest_rounds"):
                raise MigrationError(f"{name} must be a positive integer, not {value!r}")
        for name in ("interval_s", "bytes_per_s", "memory"):
            value = getattr(self, name)
            if name == "interval_s" and value is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise MigrationError(f"{name} must be a positive number, not {value!r}")
        for names, most in ((("low", "high"), 0.5), (("nvme_low", "nvme_high"), 1.0)):
            low, high = (getattr(self, name) for name in names)
            if not all(isinstance(share, (int, float)) for share in (low, high)) or not (
                0 <= low <= high <= most
            ):
                raise MigrationError(
                    f"0 <= {names[0]} <= {names[1]} <= {most} must hold, not {names[0]} {low!r} "
                    f"and {names[1]} {high!r}"
                )

    def n_to_free(self, n_free: int, n_frames: int) -> int:
        """Return how many pages of a tier of `n_frames` should give way."""
        if n_free >= int(self.low * n_frames):
            return 0
        return min(self.pages_max, int(self.high * n_frames) - n_free)

    def is_time_to_forget(self, n_accesses: int, n_dram: int) -> bool:
        """Return whether touches are halved after so many accesses since they last were."""
        return n_accesses >= self.memory * n_dram

    def has_rested(self, arrived: Counts, n_rounds: int) -> npt.NDArray[np.bool_]:
        """Return which pages may move again, given the round in which each arrived."""
        return np.asarray(n_rounds - arrived > self.rest_rounds)


def n_swaps(candidates: Counts, victims: Counts) -> int:
    """Return how many pairs of a page to promote and one that makes room for it gain something.

    Parameters
    ----------
    candidates : integers (n,)
        Touches of pages that would come, descending.
    victims : integers (m,)
        Touches of pages that would go, ascending.
    """
    n_pairs = min(len(candidates), len(victims))
    gains = candidates[:n_pairs].astype(np.int64) > victims[:n_pairs]
    return n_pairs if gains.all() else int(np.argmin(gains))
