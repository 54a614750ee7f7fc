"""Ask the memory for a cache line before it is read."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_READ = 0
_KEEP_IN_ALL_CACHES = 3
_DATA = 1


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Start to load the cache line of ``array[index]``, a 1-D array, and do not wait for it.

    A hint: it changes no value, and an index outside the array is harmless.
    """
    if not (isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"):
        raise TypingError(f"prefetch takes a contiguous 1-D array, not {array}")
    if index not in (types.int64, types.uint64):
        raise TypingError(f"prefetch takes a 64-bit index, not {index}")
    return types.void(array, index), _prefetch_line


def _prefetch_line(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = make_array(signature.args[0])(context, builder, args[0]).data
    byte = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
    number = ir.IntType(32)
    function = builder.module.declare_intrinsic(
        "llvm.prefetch",
        [byte.type],
        ir.FunctionType(ir.VoidType(), [byte.type, number, number, number]),
    )
    hints = [number(hint) for hint in (_READ, _KEEP_IN_ALL_CACHES, _DATA)]
    builder.call(function, [byte, *hints])
    return context.get_dummy_value()
