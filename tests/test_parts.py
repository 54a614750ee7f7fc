"""Small parts, each alone: budget, initial values, plan, sharing, workers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnc.sharing import Sharing
from dpnc.workers import Workers
from prefetch import Plan
from tiers import Budget, Constant, Space, SpaceSpec, Uniform, parse_size
from tiers.budget import Account
from tiers.errors import BudgetError, SpaceError


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("10GB", 10**10), ("7", 7), (9, 9), ("1kib", 1024)],
)
def test_sizes_are_read(size: str | int, size_bytes: int) -> None:
    assert parse_size(size) == size_bytes
    assert Budget.of(size).dram_bytes == size_bytes


@pytest.mark.parametrize("size", ["", "MiB", "-3", "0", 0, -1, 1.5, True, None, "3 apples", "1e3"])
def test_other_sizes_are_refused_by_value(size: Any) -> None:
    with pytest.raises(BudgetError, match=repr(size) if size is not None else "None"):
        parse_size(size)


def test_an_account_never_passes_its_limit() -> None:
    account = Account(100)
    account.charge("frames", 60)
    with pytest.raises(BudgetError, match="tables needs 41"):
        account.charge("tables", 41)
    assert (account.used_bytes, account.by_category) == (60, {"frames": 60})
    account.charge("frames", -10)
    assert (account.used_bytes, account.peak_bytes, account.left_bytes) == (50, 60, 50)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"dtype": "complex64"},
        {"row_width": 0},
        {"n_rows": 0},
        {"n_rows": (1 << 63) + 1},
        {"initial": Constant(float("nan"))},
        {"initial": Uniform(0, float("inf"))},
        {"dtype": "int32", "initial": Uniform(0, 1)},
        {"initial": Uniform(0, 1, seed=-1)},
    ],
)
def test_bad_spaces_are_refused(changes: dict[str, Any]) -> None:
    good = {"name": "a", "dtype": "float32", "row_width": 2, "n_rows": 5, "initial": Constant()}
    SpaceSpec(**good)
    with pytest.raises(SpaceError):
        SpaceSpec(**{**good, **changes})


@given(page=st.integers(0, 1 << 40), seed=st.integers(0, (1 << 64) - 1))
def test_uniform_rows_equal_the_definition_in_plain_integers(page: int, seed: int) -> None:
    mask = (1 << 64) - 1
    space = Space(0, SpaceSpec("a", "float32", 3, 1 << 60, Uniform(-2, 5, seed)), 4096)
    content = np.empty(4096, np.uint8)
    space.fill_initial(page, content)
    n_elements = space.rows_per_page * 3
    values = content[: n_elements * 4].view(np.float32)
    assert not content[n_elements * 4 :].any()
    for place in (0, 1, n_elements - 1):
        word = ((page * n_elements + place + 1) * 0x9E3779B97F4A7C15 + seed) & mask
        word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ word >> 27) * 0x94D049BB133111EB) & mask
        unit = np.float32((word ^ word >> 31) >> 40) * np.float32(2.0**-24)
        assert values[place] == np.float32(-2) + unit * np.float32(7)
    assert -2 <= values.min() <= values.max() < 5
    assert abs(values.mean() - 1.5) < 0.4


@given(
    lists=st.lists(st.lists(st.integers(0, 30), max_size=10), max_size=6),
    n_keys_max=st.integers(1, 20),
    wave=st.integers(1, 5),
)
def test_a_plan_gives_each_key_once_in_order_and_stays_bounded(
    lists: list[list[int]], n_keys_max: int, wave: int
) -> None:
    plan = Plan(n_keys_max)
    expected: list[int] = []
    for keys in lists:
        ticket = plan.add(np.array(keys, np.int64))
        fresh = [key for key in dict.fromkeys(keys) if key not in expected]
        fresh = fresh[: n_keys_max - len(expected)]
        expected += fresh
        assert (ticket.n_keys, ticket.n_planned, ticket.n_left) == (len(keys), *[len(fresh)] * 2)
        assert len(plan) == len(expected) <= n_keys_max
    given_out: list[int] = []
    while len(keys_now := plan.next_wave(wave)):
        assert len(keys_now) <= wave
        given_out += keys_now.tolist()
    assert given_out == expected
    assert len(plan) == 0


def test_a_cancelled_ticket_leaves_the_plan() -> None:
    plan = Plan(10)
    first = plan.add(np.arange(4))
    second = plan.add(np.arange(2, 8))
    plan.next_wave(1)
    plan.cancel(first)
    assert (first.n_left, len(plan)) == (0, 4)
    assert plan.next_wave(9).tolist() == [4, 5, 6, 7]
    assert second.n_left == 0
    with pytest.raises(ValueError, match="0"):
        Plan(0)


def test_sharing_admits_readers_together_and_writers_alone() -> None:
    sharing = Sharing()
    inside = threading.Barrier(2, timeout=20)
    value = [0]

    def read() -> None:
        with sharing.reading():
            inside.wait()

    def write() -> None:
        for _ in range(200):
            with sharing.writing():
                seen = value[0]
                value[0] = seen + 1

    threads = [threading.Thread(target=task) for task in (read, read, write, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert value == [400]


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_workers_cover_each_range_once_and_wait_before_they_raise(n_threads: int) -> None:
    workers = Workers(n_threads)
    hits = np.zeros(1000, np.int64)

    def work(start: int, stop: int) -> int:
        hits[start:stop] += 1
        return stop - start

    assert workers.over_ranges(1000, 10, work) == 1000
    assert (hits == 1).all()
    assert workers.over_ranges(0, 10, work) == 0
    ended = threading.Event()

    def fail() -> None:
        raise ZeroDivisionError

    def finish() -> None:
        ended.set()

    with pytest.raises(ZeroDivisionError):
        workers.each([finish, fail])
    assert ended.is_set()
    workers.close()
