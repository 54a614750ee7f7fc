"""Read-ahead: which neighbours of faulted pages to bring in before somebody asks for them.

Pages are looked at in clusters of 16 in their order. A fault in a cluster whose predecessor or
successor is in memory, nearly all of it, continues a stretch that is read throughout: a scan, or
the edge of a window that slides over the data. The rest of the cluster comes along then, in one
transfer or a few long ones. Where pages are read at random no cluster is ever whole, so nothing is
read ahead; where clusters are whole by chance it shows in pages that leave unused, and it stops.

What is chosen depends on the accesses so far alone.
"""

from __future__ import annotations

import numpy as np

from tiers.requests import Request

CLUSTER_PAGES = 16
RESIDENT_MIN = 12
"""Pages of a neighbouring cluster that are in memory where reading is dense."""
CLUSTERS_MAX = 4
"""Clusters that one claim adds to."""
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
        self.score = 0
        self._n_used = 0
        self._n_wasted = 0

    def wanted(self, missing: list[Request], n_frames: int) -> list[Request]:
        """Return pages to bring in after those that a claim missed, absent or not.

        Parameters
        ----------
        missing : list of (Space, int64 array)
            Pages that were read for a claim, ascending; in memory by now.
        n_frames : int
        """
        if n_frames < FRAMES_MIN:
            return []
        found = []
        for space, pages in missing:
            n_clusters = space.n_pages // CLUSTER_PAGES
            clusters = space.table.beside_whole(pages, CLUSTER_PAGES, n_clusters, RESIDENT_MIN)
            if len(clusters):
                clusters = clusters[:CLUSTERS_MAX, np.newaxis] * CLUSTER_PAGES
                found.append((space, (clusters + np.arange(CLUSTER_PAGES)).ravel()))
        return found

    def may(self, n_used: int, n_wasted: int) -> bool:
        """Return whether to read ahead, given how many such pages were used and wasted so far."""
        self.score += (n_used - self._n_used) - WASTE_WEIGHT * (n_wasted - self._n_wasted)
        self.score = min(SCORE_MAX, max(SCORE_MIN, self.score))
        self._n_used, self._n_wasted = n_used, n_wasted
        if self.score < 0:
            self.score += 1
            return False
        return True
