"""Batches moved between memory and files: the compiled wave and the threads, against a byte string.

Faults come from a table of functions that stands in for the C library's. What the system does by
itself is taken from the system: refused alignment, files that end, limits of size, closed files.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers import OsDisk, transfer, wave
from tiers.disk import OsFile, aligned_buffer
from tiers.transfer import IN_FLIGHT_MAX, RUN_BUFFERS_MAX, plan_runs

BLOCK = 4096
N_BLOCKS = 48
ENGINES = ("wave", "threads")

Preadv = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, use_errno=True
)
Create = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
library = ctypes.CDLL(None, use_errno=True)


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Let one of the two ways do every transfer."""
    if name == "wave":
        assert transfer._wave_calls() is not None
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_wave_calls", lambda: None)
        yield


@contextmanager
def faulty(strike: Callable[[int], Any], start: Callable[..., int] | None = None) -> Iterator[None]:
    """Stand between a wave and the C library.

    `strike` is given the number of each call: it returns None to let it pass, ("short", n) to move
    at most n bytes, or ("error", number).
    """
    numbers = itertools.count()
    threads: set[int] = set()

    def wrap(name: str) -> Any:
        real = getattr(library, name)
        real.restype = ctypes.c_ssize_t
        real.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]

        def call(descriptor: int, places: int, n_places: int, offset: int) -> int:
            threads.add(threading.get_ident())
            done = strike(next(numbers))
            kind, value = done or (None, 0)
            if kind == "error":
                ctypes.set_errno(value)
                return -1 if value else 0
            if kind != "short":
                return int(real(descriptor, places, n_places, offset))
            parts = (Iovec * n_places).from_address(places)
            kept = []
            for part in parts:
                kept.append(Iovec(part.base, min(part.size, value)))
                value -= kept[-1].size
                if value == 0:
                    break
            return int(real(descriptor, (Iovec * len(kept))(*kept), len(kept), offset))

        return Preadv(call)

    callbacks = [wrap("preadv"), wrap("pwritev"), *([Create(start)] if start else [])]
    addresses = [ctypes.cast(each, ctypes.c_void_p).value for each in callbacks]
    assert wave.CALLS is not None
    calls = wave.CALLS._replace(
        **dict(zip(("preadv", "pwritev", "pthread_create"), addresses, strict=False))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_wave_calls", lambda: calls)
        yield
    assert threads


def make(path: Path, content: bytes, *, direct: bool) -> tuple[OsDisk, OsFile]:
    path.write_bytes(content)
    disk = OsDisk()
    file = disk.open(path, "write", direct=direct)
    assert file.direct is direct
    return disk, file


def noise(seed: int, n_bytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(n_bytes)


pieces_of_blocks = st.lists(st.integers(0, N_BLOCKS - 1), unique=True, min_size=1)
cuts = st.lists(st.integers(0, N_BLOCKS * BLOCK), unique=True, min_size=2, max_size=40)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transfer")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("direct", [True, False])
@given(st.lists(st.tuples(st.booleans(), pieces_of_blocks, st.integers(1, 9)), max_size=6))
def test_blocks_are_moved_as_a_byte_string_says(
    directory: Path,
    name: str,
    direct: bool,
    operations: list[tuple[bool, list[int], int]],
) -> None:
    model = bytearray(noise(1, N_BLOCKS * BLOCK))
    disk, file = make(directory / "blocks", bytes(model), direct=direct)
    with engine(name):
        for number, (write, blocks, in_flight) in enumerate(operations):
            buffers = aligned_buffer(len(blocks), BLOCK)
            offsets = [block * BLOCK for block in blocks]
            if write:
                buffers[:] = np.frombuffer(noise(number, buffers.size), np.uint8).reshape(-1, BLOCK)
                disk.write_batch(file, offsets, list(buffers), in_flight=in_flight)
                for offset, buffer in zip(offsets, buffers, strict=True):
                    model[offset : offset + BLOCK] = buffer.tobytes()
            else:
                disk.read_batch(file, offsets, list(buffers), in_flight=in_flight)
                for offset, buffer in zip(offsets, buffers, strict=True):
                    assert buffer.tobytes() == model[offset : offset + BLOCK]
    assert file.direct is direct
    disk.close(file)
    assert (directory / "blocks").read_bytes() == model


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("direct", [True, False])
@given(cuts, st.randoms(use_true_random=False), st.booleans())
def test_pieces_of_any_size_are_moved_and_direct_transfers_given_up_where_they_do_not_fit(
    directory: Path, name: str, direct: bool, ends: list[int], random: Any, write: bool
) -> None:
    ends = sorted(ends)
    spans = [span for span in itertools.pairwise(ends) if random.random() < 0.8]
    random.shuffle(spans)
    model = bytearray(noise(2, N_BLOCKS * BLOCK))
    disk, file = make(directory / "pieces", bytes(model), direct=direct)
    source = noise(3, N_BLOCKS * BLOCK)
    buffers = [np.frombuffer(bytearray(source[a:b]), np.uint8) for a, b in spans]
    with engine(name):
        if write:
            disk.write_batch(file, [a for a, _ in spans], buffers)
            for a, b in spans:
                model[a:b] = source[a:b]
        else:
            disk.read_batch(file, [a for a, _ in spans], buffers)
            for (a, b), buffer in zip(spans, buffers, strict=True):
                assert buffer.tobytes() == model[a:b]
    disk.close(file)
    assert (directory / "pieces").read_bytes() == model


@given(cuts, st.randoms(use_true_random=False))
def test_runs_join_neighbours_in_the_order_of_the_file(ends: list[int], random: Any) -> None:
    spans = [span for span in itertools.pairwise(sorted(ends)) if random.random() < 0.9]
    random.shuffle(spans)
    memory = np.zeros(N_BLOCKS * BLOCK, np.uint8)
    runs = plan_runs([a for a, _ in spans], [memory[a:b] for a, b in spans])
    found: list[tuple[int, int]] = []
    for run in runs:
        assert 1 <= len(run.buffers) <= RUN_BUFFERS_MAX
        offset = run.offset
        for buffer in run.buffers:
            found.append((offset, offset + len(buffer)))
            offset += len(buffer)
    assert found == sorted(spans)
    for before, after in itertools.pairwise(runs):
        end = before.offset + sum(map(len, before.buffers))
        assert end < after.offset or len(before.buffers) == RUN_BUFFERS_MAX


@pytest.mark.parametrize("direct", [True, False])
@given(pieces_of_blocks, st.randoms(use_true_random=False), st.integers(1, 9))
def test_rows_are_read_and_summed_as_a_byte_string_says(
    directory: Path, direct: bool, blocks: list[int], random: Any, in_flight: int
) -> None:
    content = noise(8, N_BLOCKS * BLOCK)
    disk, file = make(directory / "rows", content, direct=direct)
    memory = aligned_buffer(N_BLOCKS + 3, BLOCK)
    rows = random.sample(range(len(memory)), len(blocks))
    tails = np.frombuffer(noise(9, 48 * len(blocks)), np.uint64).reshape(-1, 6)
    places = np.array([block * BLOCK for block in blocks])
    crcs = disk.read_rows(file, places, memory, np.array(rows), tails, in_flight=in_flight)
    assert crcs is not None
    for block, row, tail, crc in zip(blocks, rows, tails, crcs, strict=True):
        expected = content[block * BLOCK : (block + 1) * BLOCK]
        assert memory[row].tobytes() == expected
        assert google_crc32c.value(expected + tail.tobytes()) == crc
    others = np.setdiff1d(np.arange(len(memory)), rows)
    assert not memory[others].any()
    disk.close(file)


def test_rows_that_are_none_are_refused_before_anything_is_read(directory: Path) -> None:
    disk, file = make(directory / "none", noise(1, 4 * BLOCK), direct=False)
    memory, tails = aligned_buffer(2, BLOCK), np.zeros((1, 6), np.uint64)
    for offset, row in ((0, 2), (0, -1), (-BLOCK, 0)):
        with pytest.raises(ValueError, match="rows"):
            disk.read_rows(file, np.array([offset]), memory, np.array([row]), tails)
    with pytest.raises(ValueError, match="in_flight"):
        disk.read_rows(file, np.array([0]), memory, np.array([0]), tails, in_flight=0)
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        disk.read_rows(file, np.array([0]), memory, np.array([0]), tails)
    assert not memory.any()
    disk.close(file)


def test_without_a_wave_the_caller_sums(directory: Path) -> None:
    disk, file = make(directory / "sums", noise(1, 4 * BLOCK), direct=False)
    memory, tails = aligned_buffer(1, BLOCK), np.zeros((1, 6), np.uint64)
    arguments = (file, np.array([0]), memory, np.array([0]), tails)
    with engine("threads"):
        assert disk.read_rows(*arguments) is None
    with pytest.MonkeyPatch.context() as patch:
        assert wave.CALLS is not None
        calls = wave.CALLS._replace(crc32c_extend=0)
        patch.setattr(transfer, "_wave_calls", lambda: calls)
        assert disk.read_rows(*arguments) is None
    assert not memory.any()
    disk.close(file)


strikes = st.lists(
    st.none()
    | st.tuples(st.just("short"), st.integers(1, 3 * BLOCK))
    | st.tuples(st.just("error"), st.just(errno.EINTR)),
    max_size=60,
)


@given(pieces_of_blocks, strikes, st.booleans(), st.booleans(), st.integers(2, 9))
def test_short_and_interrupted_transfers_are_carried_on(
    directory: Path,
    blocks: list[int],
    script: list[Any],
    direct: bool,
    write: bool,
    in_flight: int,
) -> None:
    content = noise(4, N_BLOCKS * BLOCK)
    disk, file = make(directory / "short", content, direct=direct)
    # Something that is never one run, so that it is a wave that moves it.
    blocks = [*blocks, N_BLOCKS + 1]
    content += bytes(2 * BLOCK)
    disk.truncate(file, len(content))
    buffers = aligned_buffer(len(blocks), BLOCK)
    buffers[:] = np.frombuffer(noise(5, buffers.size), np.uint8).reshape(-1, BLOCK)
    offsets = [block * BLOCK for block in blocks]
    expected = bytearray(content)
    with faulty(lambda number: script[number] if number < len(script) else None):
        if write:
            disk.write_batch(file, offsets, list(buffers), in_flight=in_flight)
            for offset, buffer in zip(offsets, buffers, strict=True):
                expected[offset : offset + BLOCK] = buffer.tobytes()
        else:
            disk.read_batch(file, offsets, list(buffers), in_flight=in_flight)
            for offset, buffer in zip(offsets, buffers, strict=True):
                assert buffer.tobytes() == content[offset : offset + BLOCK]
    disk.close(file)
    assert (directory / "short").read_bytes() == expected


@given(pieces_of_blocks, strikes, st.booleans(), st.integers(1, 9))
def test_rows_are_summed_whole_however_they_come(
    directory: Path, blocks: list[int], script: list[Any], direct: bool, in_flight: int
) -> None:
    content = noise(10, N_BLOCKS * BLOCK)
    disk, file = make(directory / "parts", content, direct=direct)
    memory, tails = aligned_buffer(len(blocks), BLOCK), np.zeros((len(blocks), 6), np.uint64)
    places = np.array([block * BLOCK for block in blocks])
    # Direct transfers are given up at the first that is refused, and the rest is read without.
    script = [("error", errno.EINVAL), *script] if direct else script
    with faulty(lambda number: script[number] if number < len(script) else None):
        crcs = disk.read_rows(
            file, places, memory, np.arange(len(blocks)), tails, in_flight=in_flight
        )
    assert crcs is not None
    assert not file.direct
    for block, row, crc in zip(blocks, memory, crcs, strict=True):
        expected = content[block * BLOCK : (block + 1) * BLOCK]
        assert row.tobytes() == expected
        assert google_crc32c.value(expected + bytes(48)) == crc
    disk.close(file)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL])
@pytest.mark.parametrize("write", [False, True])
@given(st.integers(0, 23), st.integers(2, 9))
def test_an_error_comes_back_with_its_number_and_the_name_of_the_file(
    directory: Path, number: int, write: bool, at: int, in_flight: int
) -> None:
    disk, file = make(directory / "error", noise(6, 48 * BLOCK), direct=False)
    buffers = list(aligned_buffer(24, BLOCK))
    offsets = [2 * i * BLOCK for i in range(24)]

    def strike(call: int) -> Any:
        return ("error", number) if call == at else None

    with faulty(strike), pytest.raises(OSError) as raised:
        (disk.write_batch if write else disk.read_batch)(
            file, offsets, buffers, in_flight=in_flight
        )
    assert raised.value.errno == number
    assert raised.value.filename == str(file.path)
    disk.close(file)


@pytest.mark.parametrize("name", ENGINES)
def test_a_refused_direct_transfer_is_told_apart_from_another_error(
    directory: Path, name: str
) -> None:
    disk, file = make(directory / "odd", noise(7, 16 * BLOCK), direct=True)
    odd = [np.zeros(100, np.uint8) for _ in range(9)]
    with engine(name):
        with pytest.raises(EOFError, match=f"odd ends at byte {16 * BLOCK}"):
            disk.read_batch(file, [1000 * i for i in range(8)] + [16 * BLOCK], odd)
        assert not file.direct
        disk.read_batch(file, [1000 * i for i in range(9)], odd)
    assert odd[8].tobytes() == noise(7, 16 * BLOCK)[8000:8100]
    disk.close(file)


def test_a_device_that_refuses_every_direct_transfer_is_used_buffered(directory: Path) -> None:
    content = noise(8, 64 * BLOCK)
    disk, file = make(directory / "late", content, direct=True)
    buffers = aligned_buffer(32, BLOCK)

    def strike(number: int) -> Any:
        return ("error", errno.EINVAL) if file.direct else None

    with faulty(strike):
        disk.read_batch(file, [2 * i * BLOCK for i in range(32)], list(buffers))
    assert not file.direct
    for i, buffer in enumerate(buffers):
        assert buffer.tobytes() == content[2 * i * BLOCK :][:BLOCK]
    disk.close(file)


def test_a_write_that_moves_nothing_is_an_error(directory: Path) -> None:
    disk, file = make(directory / "nothing", bytes(8 * BLOCK), direct=False)
    with faulty(lambda number: ("error", 0)), pytest.raises(OSError, match="takes no bytes"):
        disk.write_batch(file, [0, 2 * BLOCK], list(aligned_buffer(2, BLOCK)))
    disk.close(file)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("n_pieces", [1, 20])
def test_reading_past_the_end_says_where_the_file_ends(
    directory: Path, name: str, n_pieces: int
) -> None:
    disk, file = make(directory / "end", noise(9, 8 * BLOCK + 100), direct=False)
    buffers = list(aligned_buffer(n_pieces, BLOCK))
    with engine(name), pytest.raises(EOFError, match=f"ends at byte {8 * BLOCK + 100}"):
        disk.read_batch(file, [8 * BLOCK] * n_pieces, buffers)
    disk.close(file)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("n_pieces", [1, 20])
def test_a_closed_file_is_refused_with_its_name(directory: Path, name: str, n_pieces: int) -> None:
    disk, file = make(directory / "closed", noise(10, 64 * BLOCK), direct=False)
    disk.close(file)
    buffers = list(aligned_buffer(n_pieces, BLOCK))
    offsets = [2 * i * BLOCK for i in range(n_pieces)]
    for call in (disk.read_batch, disk.write_batch):
        with engine(name), pytest.raises(OSError) as raised:
            call(file, offsets, buffers)
        assert raised.value.errno == errno.EBADF
        assert raised.value.filename == str(directory / "closed")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("n_pieces", [1, 20])
def test_a_limit_of_size_cuts_a_write_short_and_then_refuses_it(
    directory: Path, name: str, n_pieces: int
) -> None:
    disk, file = make(directory / "limited", b"", direct=False)
    buffers = aligned_buffer(n_pieces, 4 * BLOCK)
    buffers[:] = 7
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (8 * n_pieces - 6) * BLOCK
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with engine(name), pytest.raises(OSError) as raised:
            disk.write_batch(file, [8 * i * BLOCK for i in range(n_pieces)], list(buffers))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(directory / "limited")
    assert (directory / "limited").read_bytes()[limit - 2 * BLOCK :] == bytes([7]) * 2 * BLOCK
    disk.close(file)


@pytest.mark.parametrize("in_flight", [2, 5])
def test_as_many_runs_are_in_flight_as_were_asked_for(directory: Path, in_flight: int) -> None:
    disk, file = make(directory / "flight", noise(11, 64 * BLOCK), direct=True)
    all_there = threading.Barrier(in_flight)
    guard = threading.Lock()
    active, most = 0, 0

    def strike(number: int) -> Any:
        nonlocal active, most
        with guard:
            active += 1
            most = max(most, active)
        all_there.wait(60)
        with guard:
            active -= 1
        return None

    buffers = list(aligned_buffer(4 * in_flight, BLOCK))
    with faulty(strike):
        disk.read_batch(
            file, [2 * i * BLOCK for i in range(4 * in_flight)], buffers, in_flight=in_flight
        )
    assert most == in_flight
    disk.close(file)


def test_a_system_that_gives_no_threads_moves_all_the_same(directory: Path) -> None:
    content = noise(12, 64 * BLOCK)
    disk, file = make(directory / "threads", content, direct=True)
    buffers = aligned_buffer(20, BLOCK)
    asked = []

    def refuse(*arguments: int) -> int:
        asked.append(arguments)
        return errno.EAGAIN

    with faulty(lambda number: None, start=refuse):
        disk.read_batch(file, [2 * i * BLOCK for i in range(20)], list(buffers))
    assert len(asked) == 1
    for i, buffer in enumerate(buffers):
        assert buffer.tobytes() == content[2 * i * BLOCK :][:BLOCK]
    disk.close(file)


def test_after_an_error_no_run_is_begun(directory: Path) -> None:
    disk, file = make(directory / "stop", noise(15, 64 * BLOCK), direct=True)
    calls = []

    def strike(call: int) -> Any:
        calls.append(call)
        return ("error", errno.EIO) if call == 5 else None

    with faulty(strike, start=lambda *_: errno.EAGAIN), pytest.raises(OSError, match="stop"):
        disk.read_batch(file, [2 * i * BLOCK for i in range(20)], list(aligned_buffer(20, BLOCK)))
    assert len(calls) == 6
    disk.close(file)


@pytest.mark.parametrize("name", ENGINES)
def test_an_interrupt_is_raised_when_everything_in_flight_has_landed(
    directory: Path, name: str
) -> None:
    content = noise(13, 512 * 16 * BLOCK)
    disk, file = make(directory / "interrupt", content, direct=True)
    buffers = aligned_buffer(256, 16 * BLOCK)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # An exception that strikes inside a callback of the collector is lost.
    gc.collect()
    gc.disable()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with engine(name), pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            disk.read_batch(file, [32 * i * BLOCK for i in range(256)], list(buffers))
            while True:
                pass
    finally:
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    expected = np.frombuffer(content, np.uint8).reshape(256, 2, -1)[:, 0]
    found = buffers.copy()
    for buffer, whole in zip(found, expected, strict=True):
        assert not buffer.any() or np.array_equal(buffer, whole)
    # A wave is not cut short; a pool may not have been given all of it.
    assert name != "wave" or len(set(found.any(axis=1).tolist())) == 1
    others = aligned_buffer(256, 16 * BLOCK)
    with engine(name):
        disk.read_batch(file, [32 * i * BLOCK for i in range(256)], list(others))
    assert np.array_equal(others, expected)
    assert np.array_equal(found, buffers)
    disk.close(file)


@pytest.mark.parametrize("module", ["tiers", "tiers.transfer"])
def test_the_wave_waits_until_somebody_else_has_numba(module: str) -> None:
    script = (
        f"import sys, {module}\n"
        "from tiers import transfer\n"
        "assert transfer._wave_calls() is None and 'numba' not in sys.modules\n"
        "import numba\n"
        "assert transfer._wave_calls() is not None\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_threads_move_where_nothing_is_compiled() -> None:
    script = "import numba\nfrom tiers import transfer\nassert transfer._wave_calls() is None"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.parametrize(
    ("offsets", "buffers", "in_flight"),
    [
        ([0], [], 8),
        ([-1], [np.zeros(8, np.uint8)], 8),
        ([8, -1], [np.zeros(8, np.uint8)] * 2, 8),
        ([0], [np.zeros((2, 8), np.uint8)], 8),
        ([0], [np.zeros(16, np.uint8)[::2]], 8),
        ([0], [np.zeros(2, np.float32)], 8),
        ([0], [np.frombuffer(b"fixed", np.uint8)], 8),
        ([0], [np.zeros(8, np.uint8)], 0),
        ([0], [np.zeros(8, np.uint8)], IN_FLIGHT_MAX + 1),
    ],
)
def test_what_cannot_be_moved_is_refused(
    directory: Path, offsets: list[int], buffers: list[Any], in_flight: int
) -> None:
    disk, file = make(directory / "refused", noise(14, 100), direct=False)
    with pytest.raises(ValueError):
        disk.read_batch(file, offsets, buffers, in_flight=in_flight)
    disk.close(file)
