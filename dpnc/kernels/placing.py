"""Placing: where the rows of an octet begin in the arena, through the page table.

Both ways mark the pages of all rows and fill ``places`` of a slot. A row without a frame is looked
for in frame 0: what is interpolated there is thrown away by whoever is told that rows are absent.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import BRICK_HASH, EDGE_SHIFT, HASH, KIND, MASK, OFFSET, PITCH
from dpnc.kernels.geometry import BRICK_FACTORS, BRICK_FINAL
from dpnc.kernels.jit import step
from dpnc.kernels.octet import Scratch, address, hashed, inside_brick, summed, vertex_of
from dpnc.kernels.simd import (
    LANES,
    at_least_zero,
    bits_as,
    load,
    look_up,
    lowest,
    negative,
    not_zero,
    set_ones,
    splat,
    store,
    where_equal,
    wide,
)

_HALF_BITS = np.uint64(32)


@step
def place_bricks(
    geometry: npt.NDArray[np.int64],
    page_table: npt.NDArray[np.int32],
    page_shift: np.uint64,
    marks: npt.NDArray[np.uint8],
    axes: tuple[int, ...],
    features: tuple[int, ...],
    n_valid: int,
    scratch: Scratch,
    slot: int,
) -> int:
    """Fill where each row begins in the arena; mark the pages; return how many have no frame.

    For levels in bricks, which never cross a page: translated are bricks, not rows. Two thirds of
    all points have all their corners in one brick of 8^3 vertices; only for the others there is
    more to look up than the brick of corner 0. What has no frame is looked for in frame 0.
    """
    n_dims, n_corners, n_features = len(axes), 1 << len(axes), len(features)
    is_hashed = geometry[KIND] == BRICK_HASH
    edge_shift = geometry[EDGE_SHIFT]
    last = splat(np.uint32((1 << edge_shift) - 1))
    crossing = splat(np.uint32(0))
    stride = np.uint64(1)
    for d in range(n_dims):
        factor = splat(BRICK_FACTORS[d] if is_hashed else stride)
        stride *= np.uint64(geometry[PITCH])
        lower = vertex_of(scratch, d, 0)
        crossing = crossing | where_equal(lower & last, last, splat(np.uint32(1 << d)))
        brick = wide(lower >> splat(np.uint32(edge_shift))) * factor
        store(scratch.terms, LANES * 2 * d, brick)
        store(scratch.terms, LANES * (2 * d + 1), brick + factor)
        for upper in range(2):
            vertex = lower + splat(np.uint32(upper))
            inner = inside_brick(vertex, edge_shift, n_dims, d) * splat(np.uint32(n_features))
            store(scratch.inner, LANES * (2 * d + upper), inner)
    brick = summed(scratch.terms, 0, axes)
    if is_hashed:
        brick = hashed(brick) & splat(np.uint64(geometry[MASK]))
    first, shift = splat(np.uint64(geometry[OFFSET])), splat(page_shift)
    row = (brick << splat(np.uint64(edge_shift * n_dims))) + first
    store(scratch.pages, 0, row >> shift)
    set_ones(marks, scratch.pages, 0)
    frame = look_up(page_table, scratch.pages, 0)
    absent = negative(frame)
    start = wide(bits_as(at_least_zero(frame), last)) << shift
    within = row & splat((np.uint64(1) << page_shift) - np.uint64(1))
    base = (start | within) * splat(np.uint64(n_features))
    for k in range(n_corners):
        place = base + wide(summed(scratch.inner, k, axes))
        at = LANES * (slot * n_corners + k)
        store(scratch.places, at, bits_as(place, splat(np.int64(0))))
    lanes = not_zero(crossing)
    if lanes:
        store(scratch.crossing, 0, crossing)
        store(scratch.pages, 0, base)
    while lanes:
        lane = lowest(lanes)
        lanes &= lanes - 1
        borders, start_of_brick = np.int64(scratch.crossing[lane]), scratch.pages[lane]
        absent |= _cross(
            borders,
            start_of_brick,
            lane,
            geometry,
            page_table,
            page_shift,
            marks,
            axes,
            features,
            scratch,
            slot,
        )
    if absent:
        address(geometry, axes, scratch)
        offset = np.uint64(geometry[OFFSET])
        return _n_absent(offset, page_table, page_shift, n_corners, n_valid, scratch)
    return 0


@step
def _cross(
    crossing: np.int64,
    base: np.uint64,
    lane: int,
    geometry: npt.NDArray[np.int64],
    page_table: npt.NDArray[np.int32],
    page_shift: np.uint64,
    marks: npt.NDArray[np.uint8],
    axes: tuple[int, ...],
    features: tuple[int, ...],
    scratch: Scratch,
    slot: int,
) -> int:
    """Let one point find rows in other bricks; return whether one of these has no frame.

    `crossing` has a bit for each axis along which the upper vertex lies in the next brick. Corner k
    lies beyond the borders ``k & crossing``; it was placed as if its brick were that of corner 0,
    which begins at `base`.
    """
    n_dims, n_corners, n_features = len(axes), 1 << len(axes), len(features)
    is_absent = 0
    scratch.moves[0] = 0
    beyond = crossing
    while beyond:
        brick = np.uint64(0)
        for d in range(n_dims):
            brick += scratch.terms[LANES * (2 * d + ((beyond >> d) & 1)) + lane]
        if geometry[KIND] == BRICK_HASH:
            brick = ((brick ^ (brick >> _HALF_BITS)) * BRICK_FINAL) >> _HALF_BITS
            brick &= np.uint64(geometry[MASK])
        row = (brick << np.uint64(geometry[EDGE_SHIFT] * n_dims)) + np.uint64(geometry[OFFSET])
        page = row >> page_shift
        marks[page] = 1
        frame = np.int64(page_table[page])
        is_absent |= int(frame < 0)
        start = np.uint64(frame if frame > 0 else 0) << page_shift
        within = row & ((np.uint64(1) << page_shift) - np.uint64(1))
        scratch.moves[beyond] = np.int64((start | within) * np.uint64(n_features) - base)
        beyond = (beyond - 1) & crossing
    for k in range(1, n_corners):
        scratch.places[LANES * (slot * n_corners + k) + lane] += scratch.moves[k & crossing]
    return is_absent


@step
def translate(
    geometry: npt.NDArray[np.int64],
    page_table: npt.NDArray[np.int32],
    page_shift: np.uint64,
    marks: npt.NDArray[np.uint8],
    axes: tuple[int, ...],
    features: tuple[int, ...],
    n_valid: int,
    scratch: Scratch,
    slot: int,
) -> int:
    """Fill where each row begins in the arena; mark the pages; return how many have no frame.

    What has none is looked for in frame 0. Corners that mostly lie in one page follow one of them,
    all of them corner 0; where rows are hashed one by one, those that differ in the first axis.
    """
    n_corners = 1 << len(axes)
    offset = np.uint64(geometry[OFFSET])
    first, shift = splat(offset), splat(page_shift)
    within = splat((np.uint64(1) << page_shift) - np.uint64(1))
    width = splat(np.uint64(len(features)))
    sign = splat(np.uint32(0))
    signed = splat(np.int64(0))
    n_followers = 2 if geometry[KIND] == HASH else n_corners
    absent = 0
    others = 0
    for leader in range(0, n_corners, n_followers):
        row = load(scratch.rows, LANES * leader) + first
        page = row >> shift
        store(scratch.pages, 0, page)
        set_ones(marks, scratch.pages, 0)
        frame = look_up(page_table, scratch.pages, 0)
        absent |= negative(frame)
        start = wide(bits_as(at_least_zero(frame), sign)) << shift
        differ = splat(np.uint64(0))
        for k in range(leader, leader + n_followers):
            row = load(scratch.rows, LANES * k) + first
            differ = differ | ((row >> shift) ^ page)
            place = (start | (row & within)) * width
            store(scratch.places, LANES * (slot * n_corners + k), bits_as(place, signed))
        others |= not_zero(differ)
    while others:
        lane = lowest(others)
        others &= others - 1
        for k in range(1, n_corners):
            row = scratch.rows[LANES * k + lane] + offset
            page = row >> page_shift
            marks[page] = 1
            frame = np.int64(page_table[page])
            absent |= int(frame < 0)
            start = np.uint64(frame if frame > 0 else 0) << page_shift
            place = (start | (row & ((np.uint64(1) << page_shift) - np.uint64(1)))) * np.uint64(
                len(features)
            )
            scratch.places[LANES * (slot * n_corners + k) + lane] = np.int64(place)
    if absent:
        return _n_absent(offset, page_table, page_shift, n_corners, n_valid, scratch)
    return 0


@step
def _n_absent(
    offset: np.uint64,
    page_table: npt.NDArray[np.int32],
    page_shift: np.uint64,
    n_corners: int,
    n_valid: int,
    scratch: Scratch,
) -> int:
    """Return how many rows of the first `n_valid` points have no frame."""
    n_absent = 0
    for k in range(n_corners):
        for lane in range(n_valid):
            row = scratch.rows[LANES * k + lane] + offset
            n_absent += page_table[row >> page_shift] < 0
    # Another thread may have mapped all of them since they were looked up: they were missed then.
    return max(n_absent, 1)
