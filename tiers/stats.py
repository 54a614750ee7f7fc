"""Stats: what a store counted since it was opened, and how large it is."""

from __future__ import annotations

from typing import Any

from tiers.allocator import BLOCK_BYTES
from tiers.claims import Claims
from tiers.cold import Cold
from tiers.frames import Tier
from tiers.migration import Migrator
from tiers.pager import Pager


def collect(pager: Pager, claims: Claims, migrator: Migrator | None, cold: Cold) -> dict[str, Any]:
    """Return counters by tier, sizes in bytes; see `Store.stats`. Mutex held.

    A tier's `hits` are distinct pages a batch, found there; those of the page file are pages that
    were not in memory, cold ones among them. `stall_s` is what claims waited for pages, summed over
    claims; latencies are of the reads of one demand, all its pages together.
    """
    counts = pager.counts
    demanded = counts["hits"] + counts["misses"]
    written_bytes = pager.slots.bytes_written
    dirtied_bytes = counts["dirtied"] * pager.page_bytes
    return {
        "page_bytes": pager.page_bytes,
        "direct_io": pager.slots.file.direct,
        "reads": {
            "hits": counts["hits"],
            "misses": counts["misses"],
            "hit_ratio": counts["hits"] / demanded if demanded else None,
            "stall_s": claims.stall_ns / 1e9,
            "latency": pager.latencies.to_dict(),
            "queue_depth": claims.n_waiting,
            "queue_depth_max": claims.n_waiting_max,
        },
        "prefetch": {
            "fetched": counts["prefetched"],
            "used": counts["prefetch_used"],
            "failure": claims.fetcher.failure if claims.fetcher else None,
        },
        "tiers": {
            "dram": _dram(pager),
            "cxl": _cxl(pager),
            "nvme": {
                "budget_bytes": pager.slots.size_bytes_max,
                "file_bytes": pager.allocator.file_blocks * BLOCK_BYTES,
                "used_bytes": pager.allocator.used_blocks * BLOCK_BYTES,
                "hits": counts["misses"],
                "bytes_read": pager.slots.bytes_read,
                "bytes_written": written_bytes,
                "write_amplification": written_bytes / dirtied_bytes if dirtied_bytes else None,
                "syncs": pager.slots.n_syncs,
            },
            "cold": _cold(pager, cold),
        },
        "migration": _migration(pager, migrator),
    }


def _dram(pager: Pager) -> dict[str, Any]:
    counts, account = pager.counts, pager.memory.account
    hits = counts["hits"] - pager.placement.cxl_hits
    return {
        "budget_bytes": account.limit_bytes,
        "used_bytes": account.used_bytes,
        "peak_bytes": account.peak_bytes,
        "by_category": dict(account.by_category),
        **_occupancy(pager, Tier.DRAM),
        "hits": hits,
        "bytes_hit": hits * pager.page_bytes,
        "evictions": counts["evictions"] - counts["cxl_evictions"],
        "write_backs": counts["write_backs"],
    }


def _cxl(pager: Pager) -> dict[str, Any] | None:
    """Return None where there is no such tier."""
    link, hits = pager.placement.link, pager.placement.cxl_hits
    if link is None:
        return None
    return {
        "emulated": True,
        "budget_bytes": link.size_bytes,
        "used_bytes": pager.frames.n_cxl * pager.page_bytes,
        **_occupancy(pager, Tier.CXL),
        "hits": hits,
        "bytes_hit": hits * pager.page_bytes,
        "evictions": pager.counts["cxl_evictions"],
        "emulated_s": pager.placement.emulated_ns / 1e9,
        "latency_ns": link.latency_ns,
        "bandwidth_bytes_s": link.bandwidth_bytes_s,
    }


def _cold(pager: Pager, cold: Cold) -> dict[str, Any]:
    packs = pager.slots.packs
    return {
        "budget_bytes": cold.size_bytes_max,
        "used_bytes": pager.allocator.cold_blocks * BLOCK_BYTES,
        "pages_read": packs.n_read,
        "pages_written": packs.n_written,
        "bytes_read": packs.bytes_read,
        "bytes_written": packs.bytes_written,
        "packs_left": packs.n_left,
        **cold.counts,
    }


def _occupancy(pager: Pager, tier: Tier) -> dict[str, int]:
    frames = pager.frames
    of_tier = frames.of(tier)
    return {
        "n_frames": of_tier.stop - of_tier.start,
        "free_frames": frames.n_free_of(tier),
        "resident_pages": int((frames.space[of_tier] >= 0).sum()),
        "dirty_pages": int(frames.dirty[of_tier].sum()),
    }


def _migration(pager: Pager, migrator: Migrator | None) -> dict[str, Any]:
    counts = pager.counts
    return {
        "demoted": counts["demoted"],
        "promoted": counts["promoted"],
        "evicted": counts["evictions"],
        "written_ahead": counts["written_ahead"],
        "rounds": pager.frames.n_rounds,
        "bytes_moved": 0 if migrator is None else migrator.bytes_moved,
        "failure": None if migrator is None else migrator.failure,
    }
