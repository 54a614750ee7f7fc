"""Which pages are read: batches of distinct pages, ascending, endless and repeatable."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int64]

PATTERNS = ("uniform", "zipf", "sliding")
ZIPF_EXPONENT = 0.99
SLIDING_STEP_PAGES = 8


def batches(pattern: str, n_pages: int, batch: int, window: int, seed: int) -> Iterator[Pages]:
    """Yield batches of a pattern.

    Parameters
    ----------
    pattern : str
        ``"uniform"``; ``"zipf"``, popularity rank ** -0.99, ranks scattered over the file;
        ``"sliding"``, uniform in a window that moves on by 8 pages a batch.
    n_pages, batch, window : int
        Pages of the data, of a batch, of the sliding window.
    seed : int
    """
    generator = np.random.default_rng(seed)
    # The popular pages stay the same from round to round.
    place_of_rank = np.random.default_rng(0).permutation(n_pages)
    shares = np.cumsum(np.arange(1, n_pages + 1) ** -ZIPF_EXPONENT)
    window = min(n_pages, max(window, 2 * batch))
    first = 0
    while True:
        if pattern == "uniform":
            pages = generator.choice(n_pages, batch, replace=False)
        elif pattern == "zipf":
            drawn: dict[int, None] = {}
            while len(drawn) < batch:
                ranks = np.searchsorted(shares, generator.random(batch) * shares[-1])
                drawn.update(dict.fromkeys(place_of_rank[ranks].tolist()))
            pages = np.array(list(drawn)[:batch])
        else:
            pages = (first + generator.choice(window, batch, replace=False)) % n_pages
            first += SLIDING_STEP_PAGES
        yield np.sort(pages).astype(np.int64)
