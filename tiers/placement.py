"""Placement: which policy watches which frame, and what an access of CXL memory costs.

Each tier has a policy of its own, over its own frames counted from 0. Without CXL memory there is
one, and nothing is counted that only a second tier would ask for.
"""

from __future__ import annotations

import numpy as np

from tiers.budget import Cxl
from tiers.frames import Frames, Indices, Tier
from tiers.policies import Policy


class Placement:
    """The policies of both tiers; the store's mutex guards it.

    Parameters
    ----------
    frames : Frames
    policy : type of Policy
    link : Cxl or None

    Attributes
    ----------
    link : Cxl or None
        What an access of CXL memory costs.
    counts_touches : bool
        Whether accesses are counted by frame: with a second tier, or for migration.
    cxl_hits : int
        Distinct pages that a batch found in CXL memory, summed over batches.
    emulated_ns : float
        What their transfers would have taken.
    """

    def __init__(self, frames: Frames, policy: type[Policy], link: Cxl | None) -> None:
        self._frames = frames
        self._class = policy
        self._dram = policy(frames.n_dram)
        self._cxl = self._new_cxl()
        self.link = link
        self.counts_touches = frames.n_cxl > 0
        self.cxl_hits = 0
        self.emulated_ns = 0.0

    def insert(self, frames: Indices) -> None:
        """Pages came into these frames."""
        for policy, first, chosen in self._by_tier(frames):
            policy.insert(chosen, self._frames.keys(chosen + first if first else chosen))

    def access(self, frames: Indices) -> None:
        """Pages in these frames were demanded, once a batch."""
        if self.counts_touches:
            self._frames.touch(frames)
        for policy, _, chosen in self._by_tier(frames):
            policy.access(chosen)
            if policy is self._cxl and self.link is not None:
                self.cxl_hits += len(chosen)
                page_bytes = self._frames.arena.shape[1]
                self.emulated_ns += len(chosen) * self.link.transfer_ns(page_bytes)

    def remove(self, frames: Indices) -> None:
        """Pages left these frames."""
        for policy, _, chosen in self._by_tier(frames):
            policy.remove(chosen)

    def victims(self, count: int, tier: Tier) -> Indices:
        """Return up to `count` frames of a tier to give up, best first, none of them held."""
        policy = self._dram if tier == Tier.DRAM else self._cxl
        if policy is None:
            return np.empty(0, np.int64)
        of_tier = self._frames.of(tier)
        chosen = policy.victims(count, self._frames.evictable()[of_tier])
        return np.asarray(chosen + of_tier.start, np.int64)

    def resize(self, n_dram_before: int) -> None:
        """Follow a change of `frames`; pages of frames that went were removed before."""
        frames = self._frames
        self._dram.resize(frames.n_dram)
        if self._cxl is not None and frames.n_cxl and frames.n_dram == n_dram_before:
            self._cxl.resize(frames.n_cxl)
        else:
            # Frames have other numbers within the tier now: its policy begins anew.
            self._cxl = self._new_cxl()
            resident = np.flatnonzero(frames.space >= 0)
            if self._cxl is not None:
                resident = resident[resident >= frames.n_dram]
                self._cxl.insert(resident - frames.n_dram, frames.keys(resident))
        self.counts_touches |= frames.n_cxl > 0

    def _new_cxl(self) -> Policy | None:
        return self._class(self._frames.n_cxl) if self._frames.n_cxl else None

    def _by_tier(self, frames: Indices) -> list[tuple[Policy, int, Indices]]:
        """Return each policy, its first frame, and those of `frames` that it watches, from 0."""
        if self._cxl is None:
            return [(self._dram, 0, frames)]
        n_dram = self._frames.n_dram
        is_dram = frames < n_dram
        return [(self._dram, 0, frames[is_dram]), (self._cxl, n_dram, frames[~is_dram] - n_dram)]
