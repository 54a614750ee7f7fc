"""Small fields, batches and budgets that tests of fields share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dpnc
from tiers.allocator import BLOCK_BYTES
from tiers.frames import BYTES_PER_FRAME_RECORD
from tiers.memory import budget_min
from tiers.page_map import NODES_MIN

AMPLE = "64MiB"


def grid(n_dims: int = 2, layout: str = "brick", **changes: Any) -> dpnc.HashGrid:
    return dpnc.HashGrid(
        **{
            "n_dims": n_dims,
            "n_levels": 6,
            "n_features_per_level": 2,
            "log2_hashmap_size": 13,
            "base_resolution": 8,
            "per_level_scale": 1.7,
            "layout": layout,
            **changes,
        }
    )


def budget_of_share(share: float, encoding: dpnc.HashGrid, page_size: int = 4096) -> int:
    """Bytes that leave frames for `share` of the pages of features and Adam state."""
    n_pages = encoding.n_rows * 4 * (3 * encoding.n_features_per_level + 1) // page_size
    return budget_of_frames(int(share * n_pages), n_pages, page_size)


def budget_of_frames(n_frames: int, n_pages: int, page_size: int = 4096) -> int:
    """Bytes that leave `n_frames` frames beside the tables of `n_pages` pages, or the least."""
    fixed = NODES_MIN * BLOCK_BYTES + page_size + 4 * n_pages
    wanted = fixed + n_frames * (page_size + BYTES_PER_FRAME_RECORD)
    return max(wanted, budget_min(page_size) + 4 * n_pages + 4096)


def batches(
    count: int, n_points: int, n_dims: int, width: int, seed: int = 3, spread: float = 0.4
) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        corner = generator.random(n_dims) * (1 - spread)
        x = (corner + generator.random((n_points, n_dims)) * spread).astype(np.float32)
        made.append((x, generator.standard_normal((n_points, width)).astype(np.float32)))
    return made


def contents(field: dpnc.Field) -> tuple[str, bytes]:
    points = np.random.default_rng(11).random((700, field.encoding.n_dims))
    return field.digest(), field.query(points).tobytes()


@pytest.fixture(scope="module")
def shared_field(tmp_path_factory: pytest.TempPathFactory) -> Any:
    encoding = grid()
    path = tmp_path_factory.mktemp("shared") / "field"
    with dpnc.create(
        path,
        encoding,
        budget=budget_of_share(0.1, encoding),
        optimizer=dpnc.Adam(),
        head=dpnc.Head(2, 8),
        page_size=4096,
    ) as field:
        for x, grad in batches(3, 2000, 2, encoding.n_output_dims):
            field.update(x, grad)
        yield field
