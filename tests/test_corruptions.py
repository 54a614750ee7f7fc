"""Corruptions of what the root reaches: a few of what ``python -m tiers.testing corruptions`` does.

Bugs that would let damage through are planted, and found.
"""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest

from tiers import packs
from tiers.errors import CorruptionError
from tiers.packs import Packs
from tiers.page_map import FIRST_SPACE
from tiers.pager import Pager
from tiers.root import BLOCK_BYTES, Root
from tiers.testing.__main__ import main
from tiers.testing.corruption import SORTS, corrupt_one_store, corruptions
from tiers.testing.runs import ViolationError
from tiers.testing.specimen import REGIONS, SHAPES, specimen

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
SEED = 50_000


def run_corruptions(count=120, seed=SEED):
    counts = Counter()
    for part in range(len(SHAPES)):
        for outcome in corrupt_one_store(seed + part, count // len(SHAPES)):
            if outcome.violation is not None:
                raise outcome.violation
            counts += outcome.counts
    return counts


def test_whatever_is_corrupted_the_right_bytes_or_a_typed_error_comes_back():
    counts = run_corruptions(240 * SCALE)
    assert all(counts[f"struck: {region}"] for region in REGIONS)
    assert all(counts[f"by: {sort}"] for sort in SORTS)
    assert counts["outcome: everything read right"]
    assert counts["outcome: some of it refused"]


@pytest.mark.parametrize("seed", range(SEED, SEED + len(SHAPES)))
def test_a_specimen_has_a_bit_of_everything_and_knows_the_way_to_each_page(seed):
    made = specimen(seed)
    assert all(made.parts[region] for region in REGIONS)
    shape = SHAPES[seed % len(SHAPES)]
    assert len(made.newest.snapshots) == shape.n_snapshots
    assert len(made.placed) == 1 + shape.n_snapshots
    reached = {part for placed in made.placed.values() for lies in placed.values() for part in lies}
    on_the_way = {
        part
        for commit, placed in made.placed.items()
        for tree, level, page in placed
        if tree >= FIRST_SPACE and level == 0
        for part in made.way_to(commit, tree - FIRST_SPACE, page)
    }
    assert {part.region for part in reached - on_the_way} <= {"map nodes", "bitmaps", "catalogue"}
    assert {part.region for part in on_the_way} == {
        *("map nodes", "pages", "packed pages", "pack indices"),
    }


def test_what_goes_on_from_an_earlier_commit_has_a_number_that_was_another_ones():
    """Here the newest root is gone; the commit that follows is not the one of that number."""
    assert main(["corruptions", "--replay", "20126", "162"]) == 0


def test_the_command_counts_and_replays(capsys):
    assert main(["corruptions", "--count", "6", "--seed", "3", "--jobs", "1"]) == 0
    assert "6 of 6 corruptions, 0 violations" in capsys.readouterr().out
    assert main(["corruptions", "--replay", "3", "5"]) == 0
    replayed = capsys.readouterr().out
    outcome = list(corruptions(3, 6))[-1]
    assert {line.strip() for line in replayed.splitlines()} == set(outcome.counts)


def believe_pages_unverified(patch):
    patch.setattr(Pager, "verify", lambda self, space, page, place, content: None)


def write_one_root_copy(patch):
    encode = Root.encode

    def first_copy_only(self):
        both = encode(self)
        both[BLOCK_BYTES:] = 0
        return both

    patch.setattr(Root, "encode", first_copy_only)


def let_an_error_without_a_type_out(patch):
    verify = Pager.verify

    def untyped(self, space, page, place, content):
        try:
            verify(self, space, page, place, content)
        except CorruptionError as damage:
            raise KeyError(page) from damage

    patch.setattr(Pager, "verify", untyped)


def believe_what_a_pack_says(patch):
    patch.setattr(packs, "_checked", lambda raw: raw[: -packs._CRC_BYTES])


def refuse_what_lies_beside_damage(patch):
    read = Packs._read_shard

    def read_neighbours_too(self, pack, rows, buffers):
        read(self, pack, range(8), list(np.empty((8, self._page_bytes), np.uint8)))
        read(self, pack, rows, buffers)

    patch.setattr(Packs, "_read_shard", read_neighbours_too)


@pytest.mark.parametrize(
    "plant",
    [
        believe_pages_unverified,
        write_one_root_copy,
        let_an_error_without_a_type_out,
        believe_what_a_pack_says,
        refuse_what_lies_beside_damage,
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(ViolationError):
        run_corruptions()
