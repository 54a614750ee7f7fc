"""Resizing: another budget for a store that is in use."""

from __future__ import annotations

import numpy as np

from tiers.budget import Budget
from tiers.errors import BudgetError
from tiers.frames import Indices
from tiers.pager import WAVE_PAGES, Pager


def resize(pager: Pager, budget: Budget) -> None:
    """Divide the memory of a pager anew; see `Store.resize`. I/O lock held."""
    frames = pager.frames
    with pager.mutex:
        n_dram, n_cxl = pager.memory.division(budget)
    if n_dram + n_cxl > max(frames.n_frames, frames.n_frames_max):
        raise BudgetError(
            f"{budget} holds {n_dram + n_cxl} pages, and this store can grow to "
            f"{frames.n_frames_max} while it is open; open it again"
        )
    left = _vacate(pager, frames.leaving(n_dram, n_cxl))
    with pager.mutex:
        n_dram_before = frames.n_dram

        def change() -> None:
            frames.resize(n_dram, n_cxl, left)
            pager.placement.resize(n_dram_before)

        pager.memory.change(budget.dram_bytes, n_dram, n_cxl, change)
        pager.placement.link = budget.link
        pager.slots.size_bytes_max = budget.nvme_bytes


def _vacate(pager: Pager, leaving: Indices) -> Indices:
    """Evict what is in frames that go, once nobody holds or reads it; return the frames, taken."""
    frames = pager.frames
    taken = np.empty(0, np.int64)
    try:
        while True:
            with pager.mutex:
                frames.reclaim()
                taken = np.concatenate([taken, frames.take_these(leaving)])
                if len(taken) == len(leaving):
                    return taken
                loose = leaving[frames.evictable()[leaving]]
                dirty = loose[frames.dirty[loose]][:WAVE_PAGES]
                pager.evict(loose[~frames.dirty[loose]])
                frames.writing[dirty] = True
                if len(loose) == 0:
                    pager.released.wait(0.1)
            if len(dirty):
                pager.write_back(dirty)
    except BaseException:
        with pager.mutex:
            frames.return_free(taken)
        raise
