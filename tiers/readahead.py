"""Read-ahead: which neighbours of pages to bring in before somebody asks for them.

Pages are looked at in clusters of 16 in their order. A fault near a cluster that is in memory,
nearly all of it, continues a stretch that is read throughout: a scan, or the edge of a window that
slides over the data. What lies between comes along then, in one transfer or a few long ones. Where
pages are read at random hardly a cluster is ever whole, so nothing is read ahead; where clusters
are whole by chance it shows in pages that leave unused, and it stops.

Within a claim, which waits for it, only the rest of the missed page's own cluster is brought in.
Where a thread does it beside the claims (`tiers.fetcher`), it looks further back, goes on ahead of
the fault, and goes on as well when a page is used for the first time that was brought in ahead.

Within claims, what is chosen depends on the accesses so far alone; in the background also on what
the thread had brought in by then.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiers.requests import Request
from tiers.space import Space

Indices = npt.NDArray[np.int64]

CLUSTER_PAGES = 16
RESIDENT_MIN = 12
"""Pages of a cluster that are in memory where reading is dense."""
CLUSTERS_MAX = 4
"""Clusters that one claim adds to, while it waits."""
BACKGROUND_CLUSTERS_MAX = 16
BACKGROUND_REACH = 4
"""Clusters that a stretch is looked for, and continued, beyond a page."""
NEIGHBOURHOODS_MAX = 16
"""Clusters of one claim that are looked at."""
FRAMES_MIN = 16 * CLUSTER_PAGES
"""With fewer frames a cluster would push out what is being read."""
SCORE_MIN, SCORE_MAX = -64, 64
WASTE_WEIGHT = 2
"""A page that was read for nothing outweighs so many that were used."""


class ReadAhead:
    """Decides how far to read ahead, from what became of earlier pages.

    Attributes
    ----------
    score : int
        Used pages, less wasted ones, of late; below 0 nothing is read ahead, and each occasion that
        passes adds one.
    """

    def __init__(self) -> None:
        # Here, because it imports numba.
        from tiers import books

        self._books = books
        self.score = 0
        self._n_used = 0
        self._n_wasted = 0

    def wanted(
        self, touched: list[Request], n_frames: int, *, background: bool = False
    ) -> list[Request]:
        """Return pages to bring in, absent or not.

        Parameters
        ----------
        touched : list of (Space, int64 array)
            Pages that a claim missed or, in the background, was the first to use; ascending.
        n_frames : int
        background : bool
            The claim does not wait for them.
        """
        if n_frames < FRAMES_MIN:
            return []
        reach, n_max = (
            (BACKGROUND_REACH, BACKGROUND_CLUSTERS_MAX) if background else (1, CLUSTERS_MAX)
        )
        n_max = min(n_max, n_frames // FRAMES_MIN)
        return [
            (space, pages)
            for space, demanded in touched
            if len(pages := self._stretch(space, demanded, reach, n_max, background))
        ]

    def _stretch(
        self, space: Space, demanded: Indices, reach: int, n_max: int, background: bool
    ) -> Indices:
        n_clusters = space.n_pages // CLUSTER_PAGES
        n_near = min(len(demanded), NEIGHBOURHOODS_MAX)
        clusters = np.empty(n_near, np.int64)
        near = np.empty(n_near * (2 * reach + 1) * CLUSTER_PAGES, np.int64)
        n_near = self._books.neighbourhoods(
            demanded, CLUSTER_PAGES, n_clusters, reach, clusters, near
        )
        clusters = clusters[:n_near]
        near = near[: n_near * (2 * reach + 1) * CLUSTER_PAGES]
        # As far ahead as this claim itself came, so that longer batches are read further ahead.
        ahead = min(n_near, reach) if background else 0
        found = np.empty(n_max, np.int64)
        count = self._books.stretches(
            space.table.lookup(near),
            clusters,
            CLUSTER_PAGES,
            n_clusters,
            reach,
            RESIDENT_MIN,
            ahead,
            found,
        )
        if count == 0:
            return found[:0]
        first = np.sort(found[:count])[:, np.newaxis] * CLUSTER_PAGES
        pages: Indices = (first + np.arange(CLUSTER_PAGES)).ravel()
        return pages

    def may(self, n_used: int, n_wasted: int) -> bool:
        """Return whether to read ahead, given how many such pages were used and wasted so far."""
        self.score += (n_used - self._n_used) - WASTE_WEIGHT * (n_wasted - self._n_wasted)
        self.score = min(SCORE_MAX, max(SCORE_MIN, self.score))
        self._n_used, self._n_wasted = n_used, n_wasted
        if self.score < 0:
            self.score += 1
            return False
        return True
