"""Transfers: a batch of buffers moved between memory and an open file.

A batch is sorted by place, neighbours become runs, and several runs are in flight. Two ways do the
same: `tiers.wave`, one compiled call beside which the GIL is free throughout, and a pool of Python
threads. The wave needs numba, whose import takes some 120 MiB and half a second: too much for a
store of 64 MiB in a process that compiles nothing else. So it is used from the moment on when
numba has been imported, and the pool before, and where there is no wave (not Linux; a 32-bit
process; ``NUMBA_DISABLE_JIT``). The eviction policy of an open store imports it.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tiers.jobs import run_all

if TYPE_CHECKING:
    from tiers.wave import Calls

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

IN_FLIGHT = 8
"""Runs in flight unless told; eight saturate a 64 KiB random load on one NVMe device."""
IN_FLIGHT_AHEAD = 2
"""Runs in flight of pages that nobody asked for yet."""
IN_FLIGHT_MAX = 64

RUN_BUFFERS_MAX = 16
"""Most neighbouring buffers moved by one vectored call."""
RUN_BYTES_MIN = 256 << 10
"""A run of smaller buffers may be so long."""


class Copies(NamedTuple):
    """What is copied into an array of a reader while other rows are read for it.

    Attributes
    ----------
    target : uint8 array (m, row_bytes)
        Contiguous and writeable.
    rows, places : int64 arrays (k,)
        Rows that are in memory already, and where in `target` they go.
    read_places : int64 array (n,)
        Where each row goes that is read, if its checksum is right.
    crcs : int64 array (n,)
        Their checksums.
    """

    target: Bytes
    rows: Words
    places: Words
    read_places: Words
    crcs: Words


class OpenFile(Protocol):
    """A file that can be transferred from and to.

    Attributes
    ----------
    path : Path
    descriptor : int
    direct : bool
        Whether transfers bypass the page cache.
    """

    path: Path
    descriptor: int
    direct: bool

    def stop_direct(self) -> None:
        """Go on through the page cache; a second time changes nothing."""


class Run:
    """Buffers that lie next to each other in the file.

    Attributes
    ----------
    offset : int
        Where what is left to move begins in the file, in bytes.
    buffers : list of uint8 arrays
        What is left to move.
    n_bytes : int
        How much that is.
    """

    __slots__ = ("buffers", "n_bytes", "offset")

    def __init__(self, offset: int, buffer: Bytes) -> None:
        self.offset = offset
        self.buffers = [buffer]
        self.n_bytes = buffer.size

    def advance(self, n_bytes: int) -> None:
        """Leave out what has been moved."""
        self.offset += n_bytes
        self.n_bytes -= n_bytes
        if not self.n_bytes:
            self.buffers = []
            return
        while self.buffers and n_bytes >= len(self.buffers[0]):
            n_bytes -= len(self.buffers[0])
            del self.buffers[0]
        if n_bytes:
            self.buffers[0] = self.buffers[0][n_bytes:]


def plan_runs(offsets: Sequence[int], buffers: Sequence[Bytes]) -> list[Run]:
    """Return a batch as runs, in the order of the file.

    Parameters
    ----------
    offsets : sequence of int
        Bytes from the start of the file; the places of a write do not overlap.
    buffers : sequence of uint8 arrays
        One-dimensional and contiguous; those without bytes are passed over.

    Raises
    ------
    ValueError
        If an offset or a buffer is none.
    """
    if len(offsets) != len(buffers):
        raise ValueError(f"{len(offsets)} offsets for {len(buffers)} buffers")
    # One pass without numpy: for a batch of a few pages its calls cost more than the loop.
    runs: list[Run] = []
    end = in_run = -1
    for i in sorted(range(len(offsets)), key=offsets.__getitem__):
        offset, buffer = int(offsets[i]), buffers[i]
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or not buffer.flags.c_contiguous:
            raise ValueError(
                "a buffer must be a contiguous one-dimensional uint8 array, not "
                f"{buffer.dtype} {buffer.shape} with strides {buffer.strides}"
            )
        size = buffer.size
        if not size:
            continue
        # To pwritev2 an offset of -1 is the file's own position.
        if offset < 0:
            raise ValueError(f"an offset must not be negative: {offset}")
        if offset == end and in_run < RUN_BUFFERS_MAX:
            runs[-1].buffers.append(buffer)
            runs[-1].n_bytes += size
            in_run += 1
        else:
            runs.append(Run(offset, buffer))
            in_run = 1
        end = offset + size
    return runs


class Transfers:
    """Moves batches; one for each disk, for any number of threads."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pool_guard = threading.Lock()
        self._pool_process = os.getpid()

    def move(
        self,
        file: OpenFile,
        offsets: Sequence[int],
        buffers: Sequence[Bytes],
        *,
        write: bool,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        """Move a batch, all of it; nothing is in flight when this returns or raises.

        Parameters
        ----------
        file : OpenFile
        offsets, buffers : sequences
            See `plan_runs`.
        write : bool
            From the buffers to the file.
        in_flight : int
            Runs moved at the same time, 1 to `IN_FLIGHT_MAX`.

        Raises
        ------
        EOFError
            If the file ends before a buffer is full.
        OSError
            With the file's name. Any part may have been moved.
        ValueError
            If `in_flight`, an offset or a buffer is none.
        """
        _require_flight(in_flight)
        runs = plan_runs(offsets, buffers)
        if not write and not all(buffer.flags.writeable for buffer in buffers):
            raise ValueError("a buffer that is read into must be writeable")
        if len(runs) < 2 or in_flight == 1:
            _move_runs(file, runs, write)
            return
        calls = _wave_calls()
        if calls is not None:
            _move_in_wave(calls, file, *_planned(runs), write=write, in_flight=in_flight)
            return
        n_workers = min(in_flight, len(runs))
        jobs = [
            partial(_move_runs, file, runs[first::n_workers], write) for first in range(n_workers)
        ]
        run_all(self._workers(), jobs)

    def read_rows(
        self,
        file: OpenFile,
        offsets: Words,
        memory: Bytes,
        rows: Words,
        tails: npt.NDArray[np.uint64],
        *,
        in_flight: int = IN_FLIGHT,
        copies: Copies | None = None,
    ) -> Words | None:
        """Read rows of one array and sum each, in the threads that read them.

        Parameters
        ----------
        file : OpenFile
        offsets : int64 array (n,)
            Bytes from the start of the file.
        memory : uint8 array (n_rows, row_bytes)
            Contiguous and writeable.
        rows : int64 array (n,)
            Which rows are read into.
        tails : uint64 array (n, n_words)
            What follows each row in its checksum.
        in_flight : int
        copies : Copies, optional
            Copy these meanwhile.

        Returns
        -------
        int64 array (n,) or None
            crc32c of each row and its tail; None, with nothing read or copied, where only `move`
            can read.

        Raises
        ------
        EOFError, OSError, ValueError
            As `move` does.
        """
        calls = _wave_calls()
        if calls is None or not calls.crc32c_extend:
            return None
        from tiers import wave

        _require_flight(in_flight)
        if not (memory.flags.c_contiguous and memory.flags.writeable and tails.flags.c_contiguous):
            raise ValueError("memory must be contiguous and writeable, tails contiguous")
        planned = offsets, memory, rows, tails, RUN_BUFFERS_MAX
        meanwhile = None
        if copies is None:
            order, runs, places, sums = wave.plan_rows(*planned)
        else:
            order, runs, places, sums = wave.plan_rows(
                *planned, copies.crcs, copies.target, copies.read_places
            )
            if len(copies.rows):
                from tiers.copies import plan_copies

                meanwhile = plan_copies(memory, copies.rows, copies.target, copies.places)
        _move_in_wave(
            *(calls, file, runs, places),
            write=False,
            in_flight=in_flight,
            sums=sums,
            copies=meanwhile,
        )
        crcs = np.empty(len(order), np.int64)
        crcs[order] = sums[:, wave.CRC]
        return crcs

    def write_rows(
        self,
        file: OpenFile,
        offsets: Words,
        memory: Bytes,
        rows: Words,
        tails: npt.NDArray[np.uint64] | None,
        *,
        contents: Bytes | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> Words | None:
        """Write rows of one array and sum each, in the threads that write them.

        Parameters
        ----------
        file : OpenFile
        offsets : int64 array (n,)
            Bytes from the start of the file; distinct.
        memory : uint8 array (n_rows, row_bytes)
            Contiguous.
        rows : int64 array (n,)
            Which rows are written.
        tails : uint64 array (n, n_words) or None
            What follows each row in its checksum; nothing is summed without.
        contents : uint8 array (n, n_bytes), optional
            With tails: what the rows are filled with before, and zeros behind it. Contiguous.
        in_flight : int

        Returns
        -------
        int64 array (n,) or None
            crc32c of each row and its tail, zeros without tails; None, with nothing written, where
            only `move` can write.

        Raises
        ------
        OSError, ValueError
            As `move` does.
        """
        calls = _wave_calls()
        if calls is None or (tails is not None and not calls.crc32c_extend):
            return None
        from tiers import wave

        _require_flight(in_flight)
        if not memory.flags.c_contiguous or not (contents is None or contents.flags.c_contiguous):
            raise ValueError("memory and contents must be contiguous")
        by_place = np.argsort(offsets, kind="stable")
        chosen = np.empty((len(rows), 0), np.uint64) if tails is None else tails[by_place]
        run_buffers_max = max(RUN_BUFFERS_MAX, RUN_BYTES_MIN // memory.shape[1])
        _, runs, places, sums = wave.plan_rows(
            offsets[by_place], memory, rows[by_place], chosen, run_buffers_max
        )
        sources = None
        if contents is not None:
            assert tails is not None and memory.flags.writeable
            sources = np.empty((len(rows), 2), np.int64)
            sources[:, 0] = contents.ctypes.data + by_place * contents.shape[1]
            sources[:, 1] = contents.shape[1]
        _move_in_wave(
            *(calls, file, runs, places),
            write=True,
            in_flight=in_flight,
            sums=None if tails is None else sums,
            sources=sources,
        )
        crcs = np.empty(len(rows), np.int64)
        crcs[by_place] = sums[:, wave.CRC]
        return crcs

    def _workers(self) -> ThreadPoolExecutor:
        with self._pool_guard:
            if self._pool is None or self._pool_process != os.getpid():
                self._pool = ThreadPoolExecutor(IN_FLIGHT_MAX, thread_name_prefix="dpnc-disk")
                self._pool_process = os.getpid()
            return self._pool


def copy_rows(memory: Bytes, rows: Words, target: Bytes, places: Words) -> None:
    """Copy rows of one contiguous array to places of another, without the GIL where possible."""
    if "numba" in sys.modules:
        from tiers import copies

        copies.copy_rows(memory, rows, target, places)
        return
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        target[place] = memory[row]


def _wave_calls() -> Calls | None:
    """Return what a wave calls; None where there is none, or as long as it costs too much."""
    if "numba" not in sys.modules:
        return None
    from tiers import wave

    return wave.CALLS


def _require_flight(in_flight: int) -> None:
    if not 1 <= in_flight <= IN_FLIGHT_MAX:
        raise ValueError(f"in_flight must be 1 to {IN_FLIGHT_MAX}, not {in_flight!r}")


def _planned(planned: list[Run]) -> tuple[Words, Words]:
    """Return runs and places for a wave."""
    from tiers import wave

    buffers = [buffer for run in planned for buffer in run.buffers]
    counts = np.array([len(run.buffers) for run in planned])
    runs = np.zeros((len(planned), wave.RUN_WORDS), np.int64)
    runs[:, wave.OFFSET] = [run.offset for run in planned]
    runs[:, wave.FIRST] = np.cumsum(counts) - counts
    runs[:, wave.N_LEFT] = counts
    places = np.empty((len(buffers), 2), np.int64)
    places[:, 0] = [buffer.ctypes.data for buffer in buffers]
    places[:, 1] = [len(buffer) for buffer in buffers]
    return runs, places


def _move_in_wave(
    calls: Calls,
    file: OpenFile,
    runs: Words,
    places: Words,
    *,
    write: bool,
    in_flight: int,
    sums: Words | None = None,
    copies: Words | None = None,
    sources: Words | None = None,
) -> None:
    from tiers import wave

    while True:
        was_direct = file.direct
        if wave.move(
            *(calls, file.descriptor, runs, places),
            write=write,
            in_flight=in_flight,
            sums=sums,
            copies=copies,
            sources=sources,
        ):
            return
        copies = None
        failed = np.flatnonzero(runs[:, wave.ERROR])
        numbers = runs[failed, wave.ERROR]
        others = failed[numbers != errno.EINVAL]
        if was_direct and len(others) == 0:
            file.stop_direct()
            runs[failed, wave.ERROR] = 0
            continue
        first = others[0] if was_direct else failed[0]
        number, offset = int(runs[first, wave.ERROR]), int(runs[first, wave.OFFSET])
        raise (
            _stopped(file, offset, write) if number == wave.END_OF_FILE else _refused(file, number)
        )


def _move_runs(file: OpenFile, runs: list[Run], write: bool) -> None:
    call = os.pwritev if write else os.preadv
    for run in runs:
        while run.buffers:
            moved = _step(file, call, run)
            if moved == 0:
                raise _stopped(file, run.offset, write)
            run.advance(moved)


def _step(file: OpenFile, call: Callable[..., int], run: Run) -> int:
    """Move what one system call moves of a run."""
    # Some file systems accept O_DIRECT at open and refuse it at the transfer, and a transfer that
    # stopped short may go on at an odd byte. Another thread may have found that out meanwhile.
    was_direct = file.direct
    try:
        return call(file.descriptor, run.buffers, run.offset)
    except OSError as refused:
        if refused.errno != errno.EINVAL or not was_direct:
            raise _refused(file, refused.errno or errno.EIO) from None
    file.stop_direct()
    try:
        return call(file.descriptor, run.buffers, run.offset)
    except OSError as refused:
        raise _refused(file, refused.errno or errno.EIO) from None


def _refused(file: OpenFile, number: int) -> OSError:
    return OSError(number, os.strerror(number), str(file.path))


def _stopped(file: OpenFile, offset: int, write: bool) -> Exception:
    """Return what to raise for a transfer that moves nothing and reports no error."""
    if write:
        return OSError(errno.EIO, "the device takes no bytes", str(file.path))
    return EOFError(f"{file.path} ends at byte {offset}")
