"""Eviction policies: against oracles on lists, and against miss counts of libCacheSim."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import Zstd

from bench.patterns import PATTERNS, batches
from tests.oracles import policies as oracles
from tiers.errors import TierError
from tiers.policies import (
    POLICIES,
    STATE_BYTES_MIN,
    Belady,
    Clock,
    Lru,
    PolicyError,
    S3Fifo,
    S3FifoAdaptive,
    Sieve,
    policy_of,
)
from tiers.policies.replay import next_accesses, replay

CLASSES = [Belady, Clock, Lru, S3Fifo, S3FifoAdaptive, Sieve]
TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))


class Demand(NamedTuple):
    """A batch: pages, which frames are pinned, which victims stay after all, when they come back"""

    pages: list[int]
    pinned: int
    spared: int
    times: list[int]


class Drop(NamedTuple):
    frames: int


class Resize(NamedTuple):
    n_frames: int


MASKS = st.integers(0, (1 << 40) - 1) | st.just(0)
DEMANDS = st.builds(
    Demand,
    st.lists(st.integers(0, 50), max_size=12, unique=True).map(sorted),
    MASKS,
    MASKS,
    st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
STEPS = st.one_of(
    DEMANDS, DEMANDS, DEMANDS, st.builds(Drop, MASKS), st.builds(Resize, st.integers(1, 40))
)


class Cache:
    """Pages in frames, evicted as a policy says, which must be what its oracle says."""

    def __init__(self, policy_class: Any, n_frames: int) -> None:
        self.policy = policy_class(n_frames)
        self.oracle = getattr(oracles, policy_class.__name__)(n_frames)
        self.page_of: dict[int, int] = {}
        self.n_frames = n_frames
        self.n_hits = 0
        self.n_victims = 0

    def step(self, step: Demand | Drop | Resize) -> None:
        if isinstance(step, Demand):
            self.demand(step)
        elif isinstance(step, Drop):
            self.remove([frame for frame in sorted(self.page_of) if step.frames >> frame & 1])
        else:
            self.remove([frame for frame in sorted(self.page_of) if frame >= step.n_frames])
            self.n_frames = step.n_frames
            self.policy.resize(step.n_frames)
            self.oracle.resize(step.n_frames)

    def demand(self, step: Demand) -> None:
        frame_of = {page: frame for frame, page in self.page_of.items()}
        hits = [frame_of[page] for page in step.pages if page in frame_of]
        self.n_hits += len(hits)
        self.tell(hits, step.times)
        self.policy.access(np.array(hits, np.int64))
        for frame in hits:
            self.oracle.access(frame)
        absent = [page for page in step.pages if page not in frame_of]
        n_free = self.n_frames - len(self.page_of)
        evictable = [
            frame in self.page_of and not step.pinned >> frame & 1 and frame not in hits
            for frame in range(self.n_frames)
        ]
        victims = self.choose(len(absent) - n_free, evictable)
        self.remove([frame for frame in victims if not step.spared >> frame & 1])
        free = [frame for frame in range(self.n_frames) if frame not in self.page_of]
        pages = absent[: len(free)]
        frames = free[: len(pages)]
        self.tell(frames, step.times[::-1])
        # Keys may have any of their bits set.
        keys = np.array(pages, np.uint64) * np.uint64(0x0101_0000_0101_0001)
        self.policy.insert(np.array(frames, np.int64), keys)
        for frame, page, key in zip(frames, pages, keys.tolist(), strict=True):
            self.oracle.insert(frame, key)
            self.page_of[frame] = page

    def tell(self, frames: list[int], times: list[int]) -> None:
        if isinstance(self.policy, Belady):
            for frame, time in zip(frames, times, strict=False):
                self.policy.next_access[frame] = self.oracle.next_access[frame] = time

    def choose(self, count: int, evictable: list[bool]) -> list[int]:
        victims = self.policy.victims(count, np.array(evictable)).tolist()
        assert victims == self.oracle.victims(max(0, count), evictable)
        assert len(set(victims)) == len(victims) == min(max(0, count), sum(evictable))
        assert all(evictable[frame] for frame in victims)
        self.n_victims += len(victims)
        return victims

    def remove(self, frames: list[int]) -> None:
        self.policy.remove(np.array(frames, np.int64))
        for frame in frames:
            self.oracle.remove(frame)
            del self.page_of[frame]

    def check_that_no_frame_is_lost(self) -> None:
        evictable = [frame in self.page_of for frame in range(self.n_frames)]
        assert sorted(self.choose(self.n_frames, evictable)) == sorted(self.page_of)


@pytest.mark.parametrize("policy_class", CLASSES)
@given(n_frames=st.integers(1, 40), steps=st.lists(STEPS, max_size=40))
def test_a_policy_chooses_what_its_oracle_chooses(
    policy_class: Any, n_frames: int, steps: list[Demand | Drop | Resize]
) -> None:
    cache = Cache(policy_class, n_frames)
    for step in steps:
        cache.step(step)
    cache.check_that_no_frame_is_lost()


@pytest.mark.parametrize("policy_class", CLASSES)
def test_a_policy_chooses_what_its_oracle_chooses_over_a_long_run(policy_class: Any) -> None:
    """Few pages take most accesses, so that every queue, the ghost too, is passed through."""
    generator = np.random.default_rng(1)
    cache = Cache(policy_class, 32)
    for _ in range(1500):
        chance = generator.random()
        if chance < 0.02:
            cache.step(Resize(int(generator.integers(20, 41))))
        elif chance < 0.04:
            cache.step(Drop(int(generator.integers(1 << 40)) & int(generator.integers(1 << 40))))
        else:
            pages = np.unique(generator.zipf(1.3, 6) % 97).tolist()
            masks = generator.integers(1 << 40, size=4)
            times = generator.integers(50, size=12).tolist()
            pinned, spared = int(masks[0] & masks[1]), int(masks[2] & masks[3])
            cache.step(Demand(pages, pinned, spared, times))
    cache.check_that_no_frame_is_lost()
    assert cache.n_hits > 1000 and cache.n_victims > 1000


@pytest.mark.parametrize("policy_class", CLASSES)
@pytest.mark.parametrize("n_frames", [1, 20])
def test_choosing_ends_where_nothing_is_evictable_and_loses_nothing(
    policy_class: Any, n_frames: int
) -> None:
    policy = policy_class(n_frames)
    frames = np.arange(n_frames)
    nothing, everything = np.zeros(n_frames, np.bool_), np.ones(n_frames, np.bool_)
    assert policy.victims(5, nothing).tolist() == []
    policy.insert(frames, frames.astype(np.uint64))
    for _ in range(3):
        policy.access(frames)
        assert policy.victims(99, nothing).tolist() == []
    assert sorted(policy.victims(99, everything)) == frames.tolist()
    assert sorted(policy.victims(99, everything)) == frames.tolist()
    assert policy.victims(0, everything).tolist() == policy.victims(-1, everything).tolist() == []


@pytest.mark.parametrize("policy_class", CLASSES)
@pytest.mark.parametrize("n_frames", [1, 20])
def test_frames_that_were_all_accessed_often_are_given_up_all_the_same(
    policy_class: Any, n_frames: int
) -> None:
    policy = policy_class(n_frames)
    frames = np.arange(n_frames)
    policy.insert(frames, frames.astype(np.uint64))
    for _ in range(9):
        policy.access(frames)
    assert sorted(policy.victims(99, np.ones(n_frames, np.bool_))) == frames.tolist()


def test_a_page_that_came_back_soon_outlives_a_scan_under_s3fifo() -> None:
    policy, everything = S3Fifo(10), np.ones(10, np.bool_)
    frames = np.arange(10)
    policy.insert(frames, frames.astype(np.uint64))

    def bring(key: int) -> int:
        victim = policy.victims(1, everything)
        policy.remove(victim)
        policy.insert(victim, np.array([key], np.uint64))
        return int(victim[0])

    assert bring(100) == 0  # page 0 was all that the small queue held
    bring(101)
    frame = bring(0)  # a ghost knows it
    assert frame not in [bring(key) for key in range(200, 208)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_small_queue_that_adapts_reads_a_sliding_window_once_and_loses_nothing_else(
    pattern: str,
) -> None:
    n_frames = 400
    chosen = batches(pattern, 4096, 16, n_frames // 2, 1)
    keys = np.concatenate([next(chosen) for _ in range(1500)])

    def miss_ratio(policy_class: Any) -> float:
        return 1 - float(replay(policy_class(n_frames), keys)[len(keys) // 3 :].mean())

    adaptive = miss_ratio(S3FifoAdaptive)
    if pattern == "sliding":
        # All that LRU misses here is read for the first time.
        assert adaptive < 1.01 * miss_ratio(Lru) < 0.7 * miss_ratio(S3Fifo)
    else:
        assert abs(adaptive - miss_ratio(S3Fifo)) < 0.005


def state_bytes(state: Any) -> int:
    if isinstance(state, tuple):
        return sum(state_bytes(part) for part in state)
    return int(state.nbytes)


@pytest.mark.parametrize("policy_class", CLASSES)
@pytest.mark.parametrize("n_frames", [1, 2, 8, 99, 1024, 1025, 5000])
def test_a_state_costs_no_more_than_the_budget_is_charged(policy_class: Any, n_frames: int) -> None:
    policy = policy_class(1)
    for state in (policy_class(n_frames).state, policy.resize(n_frames) or policy.state):
        assert state_bytes(state) <= policy_class.bytes_per_frame * n_frames + STATE_BYTES_MIN


def test_policies_are_made_by_name() -> None:
    made = {name: policy_of(name, 8) for name in POLICIES}
    assert {name: type(policy).__name__ for name, policy in made.items()} == POLICIES
    assert type(made["s3fifo"]) is S3Fifo


@pytest.mark.parametrize("name", ["fifo", "S3Fifo", "", "belady", None, ["lru"]])
def test_another_name_is_refused_with_the_known_ones(name: Any) -> None:
    with pytest.raises(PolicyError, match="clock, lru, s3fifo, s3fifo_adaptive, sieve") as refused:
        policy_of(name, 8)
    assert repr(name) in str(refused.value)
    assert isinstance(refused.value, TierError)


@pytest.mark.parametrize("policy_class", CLASSES)
def test_a_policy_needs_frames(policy_class: Any) -> None:
    with pytest.raises(PolicyError, match=f"{policy_class.__name__} .* 0 frames"):
        policy_class(0)
    with pytest.raises(PolicyError, match="-3 frames"):
        policy_class(4).resize(-3)


@pytest.mark.parametrize("frames", [[-1], [4], [0, 4]])
def test_frames_outside_never_reach_compiled_code(frames: list[int]) -> None:
    policy = Lru(4)
    for method in (policy.access, policy.remove):
        with pytest.raises(AssertionError):
            method(np.array(frames))
    with pytest.raises(AssertionError):
        policy.insert(np.array(frames), np.zeros(len(frames), np.uint64))
    with pytest.raises(AssertionError):
        policy.victims(1, np.ones(5, np.bool_))


def test_the_package_of_policies_loads_numba_only_for_a_policy() -> None:
    script = """
import sys
from tiers.policies import POLICIES, PolicyError, policy_of
try:
    policy_of("fifo", 8)
except PolicyError:
    pass
assert "numba" not in sys.modules
policy_of("lru", 8)
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_where_no_machine_code_can_be_kept_one_warning_says_so_for_all_packages() -> None:
    script = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dpnc.kernels.jit, tiers.policies.jit
from tiers.compiled import CodeCacheWarning
assert [w.category for w in caught] == [CodeCacheWarning], caught
assert dpnc.kernels.jit.KernelCacheWarning is CodeCacheWarning
from tiers.policies import policy_of
policy_of("clock", 8)
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": "/dev/null/cache"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_a_name_that_the_package_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Fifo2"):
        import tiers.policies

        tiers.policies.Fifo2  # noqa: B018


def test_next_accesses_are_those_of_the_same_page() -> None:
    never = np.iinfo(np.int64).max
    assert next_accesses(np.array([5, 1, 5, 5, 2, 1])).tolist() == [2, 5, 3, never, never, never]
    assert next_accesses(np.empty(0, np.int64)).tolist() == []


def test_replaying_tells_the_hits() -> None:
    assert replay(Lru(2), [7, 7, 8, 9, 7, 9]).tolist() == [False, True, False, False, False, True]
    assert replay(Belady(2), [7, 7, 8, 9, 7, 9]).tolist() == [False, True, False, False, True, True]
    assert replay(S3Fifo(2), []).tolist() == []


# Traces, in units that ../shared/traces/README.md names.


def unpacked(name: str) -> bytes:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    content = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(content)
    return lzma.decompress(content) if path.suffix == ".xz" else bytes(Zstd().decode(content))


def pages_of(first: Any, last: Any) -> Any:
    """Return all pages from `first` to `last` of one request after the other."""
    count = last - first + 1
    before = np.repeat(np.cumsum(count) - count, count)
    return np.repeat(first, count) + np.arange(len(before)) - before


def arc_trace(name: str, units_per_page: int) -> Any:
    start, count = np.array(unpacked(name).split(), np.int64).reshape(-1, 4)[:, :2].T
    return pages_of(start // units_per_page, (start + count - 1) // units_per_page)


def cloudphysics(page_bytes: int, *, is_expanded: bool) -> Any:
    rows = unpacked("cloudphysics_sample.csv.zst").decode().splitlines()[1:]
    size, sector = np.array([row.split(",")[3:] for row in rows], np.int64).T
    first = sector * 512 // page_bytes
    last = (sector * 512 + size - 1) // page_bytes
    return pages_of(first, last) if is_expanded else first


KEYS = {
    "cloudphysics requests": lambda: cloudphysics(4096, is_expanded=False),
    "cloudphysics 4 KiB": lambda: cloudphysics(4096, is_expanded=True),
    "cloudphysics 64 KiB": lambda: cloudphysics(65536, is_expanded=True),
    "sprite": lambda: np.array(unpacked("lirs_sprite.trace.gz").split(), np.int64),
    "w106": lambda: np.frombuffer(unpacked("cloudphysics_w106.u32.xz"), "<u4"),
    "P3 4 KiB": lambda: arc_trace("P3.lis.zst", 8),
    "P6 4 KiB": lambda: arc_trace("P6.lis.zst", 8),
    "P6 64 KiB": lambda: arc_trace("P6.lis.zst", 128),
    "OLTP": lambda: arc_trace("OLTP.lis.zst", 1),
}
# Misses that libcachesim 0.3.5 from PyPI counts with its default parameters: pages of size 1, a
# cache of int(0.1 * distinct pages).
MISSES = {
    "cloudphysics requests": (113872, 88500, 88440, 87278, 83142, 69309),
    "cloudphysics 4 KiB": (1141869, 998105, 996740, 951107, 935406, 771969),
    "cloudphysics 64 KiB": (177678, 71771, 72144, 72611, 66817, 52312),
    "sprite": (133996, 18121, 18211, 24762, 18809, 11575),
    "w106": (5292456, 435439, 443318, 442444, 408965, 320465),
    "P3 4 KiB": (611918, 449734, 437289, 411289, 357571, 239182),
    "P6 4 KiB": (2021684, 1311681, 1253762, 1022305, 910516, 473502),
    "P6 64 KiB": (611645, 173799, 171649, 155353, 143437, 75324),
    "OLTP": (914145, 306044, 302970, 304774, 295594, 217506),
}
SMALL = ("cloudphysics requests", "sprite")


@pytest.mark.parametrize("trace", MISSES)
def test_misses_on_real_traces_are_those_of_libcachesim(trace: str) -> None:
    if trace not in SMALL and SCALE <= 1:
        pytest.skip("a long trace; set DPNC_TEST_SCALE above 1")
    keys = KEYS[trace]()
    n_requests, lru, clock, sieve, s3fifo, belady = MISSES[trace]
    assert len(keys) == n_requests
    n_frames = int(0.1 * len(np.unique(keys)))

    def count(policy_class: Any) -> int:
        return int(n_requests - replay(policy_class(n_frames), keys).sum())

    assert [count(each) for each in (Lru, Clock, Sieve, Belady)] == [lru, clock, sieve, belady]
    # libcachesim asks the ghost queue before it evicts, a store after.
    assert abs(count(S3Fifo) - s3fifo) / n_requests < 0.002
