"""Corruptions of what the root reaches: a few of what ``python -m tiers.testing corruptions`` does.

Bugs that would let damage through are planted, and found.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tiers.errors import CorruptionError
from tiers.pager import Pager
from tiers.root import BLOCK_BYTES, Root
from tiers.testing.__main__ import main
from tiers.testing.corruption import SORTS, corrupt_one_store, corruptions
from tiers.testing.runs import ViolationError
from tiers.testing.specimen import REGIONS

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
SEED = 50_000


def run_corruptions(count=120, seed=SEED):
    counts = Counter()
    for part in range(3):
        for outcome in corrupt_one_store(seed + part, count // 3):
            if outcome.violation is not None:
                raise outcome.violation
            counts += outcome.counts
    return counts


def test_whatever_is_corrupted_the_right_bytes_or_a_typed_error_comes_back():
    counts = run_corruptions(180 * SCALE)
    assert all(counts[f"struck: {region}"] for region in REGIONS)
    assert all(counts[f"by: {sort}"] for sort in SORTS)
    assert counts["outcome: everything read right"]
    assert counts["outcome: some of it refused"]


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


@pytest.mark.parametrize(
    "plant",
    [
        believe_pages_unverified,
        write_one_root_copy,
        let_an_error_without_a_type_out,
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(ViolationError):
        run_corruptions()
