"""Latencies: how long things took, in fixed buckets, so that percentiles cost no memory.

Bucket b holds times from 2^(b/4) ns on, up to the next one: a percentile is right to 19 %.
"""

from __future__ import annotations

import math

import numpy as np

BUCKETS_PER_OCTAVE = 4
N_BUCKETS = 48 * BUCKETS_PER_OCTAVE
"""Up to 2^48 ns, three days; what takes longer is in the last one."""


class Latencies:
    """A histogram of times.

    Attributes
    ----------
    counts : int64 array (N_BUCKETS,)
    """

    def __init__(self) -> None:
        self.counts = np.zeros(N_BUCKETS, np.int64)

    def add(self, latency_ns: float) -> None:
        bucket = int(math.log2(max(latency_ns, 1)) * BUCKETS_PER_OCTAVE)
        self.counts[min(bucket, N_BUCKETS - 1)] += 1

    def percentile_ns(self, share: float) -> float | None:
        """Return a time that `share` of all, in 0 .. 1, do not pass: the end of its bucket.

        None where nothing was counted.
        """
        total = int(self.counts.sum())
        if total == 0:
            return None
        rank = max(1, math.ceil(share * total))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(2.0 ** ((bucket + 1) / BUCKETS_PER_OCTAVE))

    def to_dict(self) -> dict[str, float | int | None]:
        """Return how many there were, and percentiles in ns."""
        return {
            "count": int(self.counts.sum()),
            "p50_ns": self.percentile_ns(0.5),
            "p90_ns": self.percentile_ns(0.9),
            "p99_ns": self.percentile_ns(0.99),
            "p999_ns": self.percentile_ns(0.999),
        }
