"""Stats: what a store counted since it was opened, and how large it is."""

from __future__ import annotations

from typing import Any

from tiers.allocator import BLOCK_BYTES
from tiers.pager import Pager


def collect(pager: Pager) -> dict[str, Any]:
    """Return the pager's counters by tier, sizes in bytes; see `Store.stats`. Mutex held."""
    counts = pager.counts
    account = pager.memory.account
    demanded = counts["hits"] + counts["misses"]
    return {
        "page_bytes": pager.page_bytes,
        "direct_io": pager.slots.file.direct,
        "reads": {
            "hits": counts["hits"],
            "misses": counts["misses"],
            "hit_ratio": counts["hits"] / demanded if demanded else None,
        },
        "prefetch": {"fetched": counts["prefetched"], "used": counts["prefetch_used"]},
        "tiers": {
            "dram": {
                "budget_bytes": account.limit_bytes,
                "used_bytes": account.used_bytes,
                "peak_bytes": account.peak_bytes,
                "by_category": dict(account.by_category),
                "n_frames": pager.frames.n_frames,
                "resident_pages": pager.frames.n_mapped,
                "dirty_pages": int(pager.frames.dirty.sum()),
                "evictions": counts["evictions"],
                "write_backs": counts["write_backs"],
            },
            "nvme": {
                "budget_bytes": pager.slots.size_bytes_max,
                "file_bytes": pager.allocator.file_blocks * BLOCK_BYTES,
                "used_bytes": pager.allocator.used_blocks * BLOCK_BYTES,
                "bytes_read": pager.slots.bytes_read,
                "bytes_written": pager.slots.bytes_written,
                "syncs": pager.slots.n_syncs,
            },
        },
    }
