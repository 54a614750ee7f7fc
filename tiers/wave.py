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
) = range(11)
BOARD_WORDS = 11

_PLACE_BYTES = 16
_EINTR = errno.EINTR
_WORD = ir.IntType(64)
_NUMBER = ir.IntType(32)


class Calls(NamedTuple):
    """Addresses of the functions of the C library that a wave calls."""

    preadv: int
    pwritev: int
    error_location: int
    pthread_create: int
    pthread_join: int


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
    return Calls(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))


CALLS = system_calls()


def move(
    calls: Calls, descriptor: int, runs: Words, places: Words, *, write: bool, in_flight: int
) -> None:
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
    """
    board = np.zeros(BOARD_WORDS, np.int64)
    board[_TRANSFER] = calls.pwritev if write else calls.preadv
    board[_ERROR_LOCATION] = calls.error_location
    board[_DESCRIPTOR] = descriptor
    board[_RUNS], board[_N_RUNS] = runs.ctypes.data, len(runs)
    board[_PLACES], board[_N_PLACES] = places.ctypes.data, len(places)
    board[_START], board[_JOIN] = calls.pthread_create, calls.pthread_join
    n_helpers = min(in_flight, len(runs)) - 1
    _move(board, np.empty(max(n_helpers, 1), np.int64), n_helpers)


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
        error = _move_run(board, runs[number], places)
        if error != 0:
            runs[number, ERROR] = error
            board[_STOPPED] = 1
    return 0


def _work_alone(board_address: int) -> int:
    return _work(board_address)


@compiled
def _move(board: Words, threads: Words, n_helpers: int) -> None:
    n_started = 0
    # Where the system gives no more threads, fewer do the same work.
    while (
        n_started < n_helpers
        and _start_thread(board[_START], threads.ctypes.data + 8 * n_started, board.ctypes.data)
        == 0
    ):
        n_started += 1
    _work(board.ctypes.data)
    for helper in range(n_started):
        _join_thread(board[_JOIN], threads[helper])
