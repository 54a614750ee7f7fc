"""A wave: many transfers of one file, several in flight, in one call that never needs the GIL.

A Python thread that issues a transfer needs the GIL again after every one of them, and beside a
thread that computes in Python it waits a switch interval for it each time. Here the whole batch is
one compiled call: it starts native threads, which never hold the GIL, moves runs beside them until
none is left, and joins them. Nothing outlives the call, so there is no pool to fork, to stop or to
interrupt, and a Ctrl-C is seen when it returns.

The system's functions are addresses in a table (`Calls`): a test puts its own there.

::

    board   int64 (BOARD_WORDS,)   what the threads share: addresses, counts, which run is next
    runs    int64 (n_runs, 4)      offset in the file, first buffer, buffers left, error
    places  int64 (n_buffers, 2)   address and size of what is left of a buffer: struct iovec
    sums    int64 (n_buffers, 7)   address and size of a buffer and of its tail, crc32c of both,
                                   crc32c expected, address that a right one is copied to or 0
    copies  int64 (n_copies, 3)    address of rows to be copied meanwhile, and where to, and size

A thread that has filled a buffer sums it at once, while it is still in the processor's cache and
the others read on: checksums of a batch, and copies for its reader, cost next to nothing beside its
reads. What is written is filled from elsewhere, if asked, and summed before, by the thread that is
about to write it.
"""

from __future__ import annotations

import ctypes
import errno
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, config
from numba.core import types
from numba.extending import intrinsic

from tiers.compiled import Compiler
from tiers.copies import COPY_WORDS, copy_all, copy_bytes

Words = npt.NDArray[np.int64]

compiled = Compiler("wave", Path(__file__).parent)

END_OF_FILE = -1
"""In the place of an error number: the call moved nothing and reported no error."""

OFFSET, FIRST, N_LEFT, ERROR = range(4)
RUN_WORDS = 4

(
    _TRANSFER,
    _ERROR_LOCATION,
    _DESCRIPTOR,
    _RUNS,
    _N_RUNS,
    _PLACES,
    _N_PLACES,
    _NEXT,
    _STOPPED,
    _START,
    _JOIN,
    _EXTEND,
    _SUMS,
    _SUM_FIRST,
    _SOURCES,
) = range(15)
BOARD_WORDS = 15

ADDRESS, SIZE, TAIL, TAIL_SIZE, CRC, EXPECTED, TARGET = range(7)
SUM_WORDS = 7

_PLACE_BYTES = 16
_EINTR = errno.EINTR
_CHECK = 0xE3069283
"""crc32c of the digits 1 to 9, as RFC 3720 and every list of checksums have it."""
_SIZE = ctypes.c_size_t
_WORD = ir.IntType(64)
_NUMBER = ir.IntType(32)


class Calls(NamedTuple):
    """Addresses of the functions of the C library that a wave calls, and of one that sums.

    `crc32c_extend` is google-crc32c's, 0 where that has no compiled code.
    """

    preadv: int
    pwritev: int
    error_location: int
    pthread_create: int
    pthread_join: int
    crc32c_extend: int = 0


def system_calls() -> Calls | None:
    """Return the addresses of this process's C library; None where there can be no wave.

    Off Linux the names differ, in a 32-bit process an offset is not one 64-bit argument, and
    uncompiled (``NUMBA_DISABLE_JIT``) nothing can be called by its address.
    """
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8 or config.DISABLE_JIT:
        return None
    library = ctypes.CDLL(None)
    names = ("preadv", "pwritev", "__errno_location", "pthread_create", "pthread_join")
    try:
        functions = [getattr(library, name) for name in names]
    except AttributeError:
        return None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
    return Calls(*addresses)._replace(crc32c_extend=_crc32c_extend())


def _crc32c_extend() -> int:
    """Return the address of ``uint32_t crc32c_extend(uint32_t, const uint8_t *, size_t)``, or 0."""
    try:
        from google_crc32c import _crc32c

        # The library that the extension was linked with is searched as well.
        function = ctypes.CDLL(_crc32c.__file__).crc32c_extend
    except (ImportError, OSError, AttributeError):
        return 0
    function.restype, function.argtypes = ctypes.c_uint32, (ctypes.c_uint32, ctypes.c_char_p, _SIZE)
    if function(0, b"123456789", 9) != _CHECK:
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


CALLS = system_calls()


def move(
    calls: Calls,
    descriptor: int,
    runs: Words,
    places: Words,
    *,
    write: bool,
    in_flight: int,
    sums: Words | None = None,
    copies: Words | None = None,
    sources: Words | None = None,
) -> bool:
    """Move runs of buffers, `in_flight` at a time, in the order in which they are listed.

    What is left to move is written back into `runs` and `places`: a run that is done has no buffer
    left, and one that failed tells why. After a failure no further run is begun; a second call goes
    on where the first one stopped.

    Parameters
    ----------
    calls : Calls
    descriptor : int
    runs : int64 array (n_runs, 4)
        Offset in the file in bytes; index of the first buffer; how many buffers; an error number,
        or `END_OF_FILE`, zero to begin with.
    places : int64 array (n_buffers, 2)
        Address and size in bytes of each buffer; the caller keeps them alive.
    write : bool
        From the buffers to the file.
    in_flight : int
        At least 1; so many threads work, the calling one among them.
    sums : int64 array (n_buffers, 7), optional
        Address and size of each buffer and of what follows it in its checksum; a column that
        receives the checksum; the one that is expected, and where a buffer with that one is copied
        to, 0 for nowhere. `calls` has a function for it then.
    copies : int64 array (n_copies, 3), optional
        Addresses from and to which bytes are copied while the others read, and how many.
    sources : int64 array (n_buffers, 2), optional
        With `sums`, of a write: address and size of what each buffer is filled with before, the
        rest of it with zeros; the caller keeps it alive.

    Returns
    -------
    bool
        Whether all was moved.
    """
    n_helpers = min(in_flight, len(runs)) - (copies is None)
    extend = 0
    if sums is None:
        sums = _NO_SUMS
    else:
        extend = calls.crc32c_extend
        assert extend
    all_moved: bool = _move(
        calls.pwritev if write else calls.preadv,
        calls.error_location,
        calls.pthread_create,
        calls.pthread_join,
        extend,
        descriptor,
        runs,
        places,
        sums,
        _NO_COPIES if copies is None else copies,
        write,
        _NO_SUMS if sources is None else sources,
        sources is not None,
        n_helpers,
    )
    return all_moved


_NO_SUMS: Words = np.zeros((1, SUM_WORDS), np.int64)
_NO_COPIES: Words = np.zeros((0, COPY_WORDS), np.int64)


def plan_rows(
    offsets: Words,
    memory: npt.NDArray[np.uint8],
    rows: Words,
    tails: npt.NDArray[np.uint64],
    run_buffers_max: int,
    crcs: Words | None = None,
    target: npt.NDArray[np.uint8] | None = None,
    target_rows: Words | None = None,
) -> tuple[Words, Words, Words, Words]:
    """Return order, runs, places and sums of rows of one array, to be read from a file or written.

    Parameters
    ----------
    offsets : int64 array (n,)
        Where each row begins in the file, in bytes, in any order; distinct.
    memory : uint8 array (n_rows, row_bytes)
        Contiguous, and writeable to be read into.
    rows : int64 array (n,)
        Distinct.
    tails : uint64 array (n, n_words)
        Contiguous; the caller keeps it alive.
    run_buffers_max : int
        Most neighbours in one run.
    crcs : int64 array (n,), optional
    target : uint8 array (m, row_bytes), optional
    target_rows : int64 array (n,), optional
        A row whose checksum is that of `crcs` is copied to this row of `target`, which is
        contiguous and writeable.

    Raises
    ------
    ValueError
        If a row or an offset is none.
    """
    n = len(offsets)
    order, places = np.empty(n, np.int64), np.empty((n, 2), np.int64)
    runs, sums = np.empty((n, RUN_WORDS), np.int64), np.empty((n, SUM_WORDS), np.int64)
    n_runs = _plan(offsets, memory, rows, tails, order, runs, places, sums, run_buffers_max)
    if n_runs < 0:
        raise ValueError(f"rows {rows} of {len(memory)}, offsets {offsets}")
    if (
        target is not None
        and (crcs is not None and target_rows is not None)
        and not _plan_targets(target, target_rows, crcs, order, sums)
    ):
        raise ValueError(f"rows {target_rows} of {len(target)}")
    return order, runs[:n_runs], places, sums


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """Return an address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _transfer(
    typing_context: Any, function: Any, descriptor: Any, places: Any, n_places: Any, offset: Any
) -> Any:
    """Call preadv or pwritev at the address `function`; return what it returns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_NUMBER, _WORD, _NUMBER, _WORD])
        call = builder.inttoptr(args[0], kind.as_pointer())
        narrow = [builder.trunc(args[1], _NUMBER), args[2], builder.trunc(args[3], _NUMBER)]
        return builder.call(call, [*narrow, args[4]])

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def _error_number(typing_context: Any, function: Any) -> Any:
    """Return errno of this thread; `function` is the address of what says where it is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_NUMBER.as_pointer(), [])
        place = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.sext(builder.load(place), _WORD)

    return types.int64(types.int64), generate


@intrinsic
def _extend(typing_context: Any, function: Any, crc: Any, address: Any, size: Any) -> Any:
    """Return the checksum `crc` extended by bytes; `function` is the address of what does it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_NUMBER, [_NUMBER, _WORD, _WORD])
        call = builder.inttoptr(args[0], kind.as_pointer())
        crc = builder.trunc(args[1], _NUMBER)
        return builder.zext(builder.call(call, [crc, args[2], args[3]]), _WORD)

    return types.int64(*[types.int64] * 4), generate


@intrinsic
def _take_next(typing_context: Any, address: Any) -> Any:
    """Add one to the word at an address, as one step among threads; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", place, _WORD(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def _start_thread(typing_context: Any, create: Any, thread: Any, board: Any) -> Any:
    """Start a thread that runs `_work`; return pthread_create's error number.

    `thread` is the address of the word that receives its handle.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        work = context.compile_subroutine(builder, _work_alone, types.int64(types.int64))
        body_kind = ir.FunctionType(_WORD, [_WORD])
        body = ir.Function(builder.module, body_kind, builder.module.get_unique_name("wave_thread"))
        body.linkage = "internal"
        inside = ir.IRBuilder(body.append_basic_block())
        _, result = context.call_internal_no_propagate(
            inside, work.fndesc, types.int64(types.int64), list(body.args)
        )
        inside.ret(result)
        kind = ir.FunctionType(_NUMBER, [_WORD, _WORD, body_kind.as_pointer(), _WORD])
        call = builder.inttoptr(args[0], kind.as_pointer())
        return builder.sext(builder.call(call, [args[1], _WORD(0), body, args[2]]), _WORD)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _join_thread(typing_context: Any, join: Any, thread: Any) -> Any:
    """Wait for the end of a thread, by its handle; return pthread_join's error number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_NUMBER, [_WORD, _WORD])
        call = builder.inttoptr(args[0], kind.as_pointer())
        return builder.sext(builder.call(call, [args[1], _WORD(0)]), _WORD)

    return types.int64(types.int64, types.int64), generate


@compiled
def _plan_targets(
    target: npt.NDArray[np.uint8], target_rows: Words, crcs: Words, order: Words, sums: Words
) -> bool:
    """Let rows with these checksums be copied to rows of `target`; return whether each is one."""
    row_bytes = target.shape[1]
    for place in range(len(order)):
        row = target_rows[order[place]]
        if not 0 <= row < len(target) or sums[place, SIZE] != row_bytes:
            return False
        sums[place, EXPECTED] = crcs[order[place]]
        sums[place, TARGET] = target.ctypes.data + row_bytes * row
    return True


@compiled
def _sum(board: Words, buffer: int) -> None:
    """Write the checksum of a buffer and its tail; copy it if it is right."""
    sums = carray(_pointer(board[_SUMS] + 8 * SUM_WORDS * buffer), (SUM_WORDS,), np.int64)
    crc = _extend(board[_EXTEND], 0, sums[ADDRESS], sums[SIZE])
    sums[CRC] = _extend(board[_EXTEND], crc, sums[TAIL], sums[TAIL_SIZE])
    if sums[TARGET] != 0 and sums[CRC] == sums[EXPECTED]:
        copy_bytes(sums[ADDRESS], sums[TARGET], sums[SIZE])


@compiled
def _fill(board: Words, buffer: int) -> None:
    """Copy into a buffer what it is to hold, and zeros behind that."""
    sums = carray(_pointer(board[_SUMS] + 8 * SUM_WORDS * buffer), (SUM_WORDS,), np.int64)
    source = carray(_pointer(board[_SOURCES] + 16 * buffer), (2,), np.int64)
    copy_bytes(source[ADDRESS], sums[ADDRESS], source[SIZE])
    rest = carray(_pointer(sums[ADDRESS] + source[SIZE]), (sums[SIZE] - source[SIZE],), np.uint8)
    rest[:] = 0


@compiled
def _move_run(board: Words, run: Words, places: Words) -> int:
    """Move one run; return 0, an error number, or `END_OF_FILE`."""
    while run[N_LEFT] > 0:
        moved = _transfer(
            board[_TRANSFER],
            board[_DESCRIPTOR],
            board[_PLACES] + _PLACE_BYTES * run[FIRST],
            run[N_LEFT],
            run[OFFSET],
        )
        if moved < 0:
            error: int = _error_number(board[_ERROR_LOCATION])
            if error == _EINTR:
                continue
            return error
        if moved == 0:
            return END_OF_FILE
        run[OFFSET] += moved
        while moved > 0:
            place = places[run[FIRST]]
            part = min(moved, place[1])
            place[0] += part
            place[1] -= part
            moved -= part
            if place[1] == 0:
                if board[_EXTEND] != 0 and board[_SUM_FIRST] == 0:
                    _sum(board, run[FIRST])
                run[FIRST] += 1
                run[N_LEFT] -= 1
    return 0


@compiled
def _work(board_address: int) -> int:
    """Move runs until none is left to begin, or one has failed."""
    board = carray(_pointer(board_address), (BOARD_WORDS,), np.int64)
    runs = carray(_pointer(board[_RUNS]), (board[_N_RUNS], RUN_WORDS), np.int64)
    places = carray(_pointer(board[_PLACES]), (board[_N_PLACES], 2), np.int64)
    while board[_STOPPED] == 0:
        number = _take_next(board_address + 8 * _NEXT)
        if number >= len(runs):
            break
        if board[_EXTEND] != 0 and board[_SUM_FIRST] != 0:
            for buffer in range(runs[number, FIRST], runs[number, FIRST] + runs[number, N_LEFT]):
                if board[_SOURCES] != 0:
                    _fill(board, buffer)
                _sum(board, buffer)
        error = _move_run(board, runs[number], places)
        if error != 0:
            runs[number, ERROR] = error
            board[_STOPPED] = 1
    return 0


def _work_alone(board_address: int) -> int:
    return _work(board_address)


@compiled
def _move(
    transfer: int,
    error_location: int,
    start: int,
    join: int,
    extend: int,
    descriptor: int,
    runs: Words,
    places: Words,
    sums: Words,
    copies: Words,
    sum_first: bool,
    sources: Words,
    has_sources: bool,
    n_helpers: int,
) -> bool:
    board = np.zeros(BOARD_WORDS, np.int64)
    board[_TRANSFER] = transfer
    board[_ERROR_LOCATION] = error_location
    board[_DESCRIPTOR] = descriptor
    board[_RUNS], board[_N_RUNS] = runs.ctypes.data, len(runs)
    board[_PLACES], board[_N_PLACES] = places.ctypes.data, len(places)
    board[_START], board[_JOIN] = start, join
    board[_EXTEND], board[_SUMS] = extend, sums.ctypes.data
    board[_SUM_FIRST] = sum_first
    board[_SOURCES] = sources.ctypes.data if has_sources else 0
    threads = np.empty(max(n_helpers, 1), np.int64)
    n_started = 0
    # Where the system gives no more threads, fewer do the same work.
    while (
        n_started < n_helpers
        and _start_thread(board[_START], threads.ctypes.data + 8 * n_started, board.ctypes.data)
        == 0
    ):
        n_started += 1
    copy_all(copies)
    _work(board.ctypes.data)
    for helper in range(n_started):
        _join_thread(board[_JOIN], threads[helper])
    return bool(board[_STOPPED] == 0)


@compiled
def _plan(
    offsets: Words,
    memory: npt.NDArray[np.uint8],
    rows: Words,
    tails: npt.NDArray[np.uint64],
    order: Words,
    runs: Words,
    places: Words,
    sums: Words,
    run_buffers_max: int,
) -> int:
    """Fill order, runs, places and sums; return how many runs there are, -1 if a row is none."""
    row_bytes = memory.shape[1]
    memory_address, tails_address = memory.ctypes.data, tails.ctypes.data
    tail_bytes = 8 * tails.shape[1]
    n_runs = 0
    for i in range(len(offsets)):
        if offsets[i] < 0 or rows[i] < 0 or rows[i] >= len(memory):
            return -1
        # Insertion: what was written together lies in order, and a batch is not long.
        place = i
        while place > 0 and offsets[order[place - 1]] > offsets[i]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = i
    for place in range(len(order)):
        number = order[place]
        address = memory_address + row_bytes * rows[number]
        places[place, 0], places[place, 1] = address, row_bytes
        sums[place, ADDRESS], sums[place, SIZE] = address, row_bytes
        sums[place, TAIL] = tails_address + tail_bytes * number
        sums[place, TAIL_SIZE] = tail_bytes
        sums[place, CRC] = sums[place, EXPECTED] = sums[place, TARGET] = 0
        if (
            place == 0
            or offsets[number] != offsets[order[place - 1]] + row_bytes
            or runs[n_runs - 1, N_LEFT] == run_buffers_max
        ):
            runs[n_runs, OFFSET], runs[n_runs, FIRST] = offsets[number], place
            runs[n_runs, N_LEFT], runs[n_runs, ERROR] = 0, 0
            n_runs += 1
        runs[n_runs - 1, N_LEFT] += 1
    return n_runs
