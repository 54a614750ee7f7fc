"""float16 rows in kernels: numba has no float16 on a CPU, so the bits travel as uint16."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic
from numba.np.arrayobj import make_array


@intrinsic
def widen(typing_context: Any, value: Any) -> Any:
    """Return the float32 equal to `value`: the bits of a float16 as uint16, or a float32 itself.

    Exact for every float16: subnormals, infinities and NaN included.
    """
    if value == types.float32:
        return types.float32(value), _return_argument
    if value == types.uint16:
        return types.float32(value), _extend_half
    raise TypingError(f"widen takes uint16 or float32, not {value}")


@intrinsic
def narrow(typing_context: Any, value: Any) -> Any:
    """Return the bits, as uint16, of the float16 nearest to the float32 `value`; ties to even.

    What is too large for a float16 becomes an infinity.
    """
    if value == types.float32:
        return types.uint16(value), _truncate_to_half
    raise TypingError(f"narrow takes float32, not {value}")


@intrinsic
def widen_pair(typing_context: Any, values: Any, at: Any) -> Any:
    """Return ``widen(values[at]), widen(values[at + 1])`` with one load and one conversion."""
    is_line = isinstance(values, types.Array) and values.ndim == 1 and values.layout == "C"
    if not is_line or values.dtype not in (types.float32, types.uint16) or at != types.uint64:
        raise TypingError(f"widen_pair takes a 1-D array and a uint64, not {values} and {at}")
    return UniTuple(types.float32, 2)(values, at), _load_pair


def _load_pair(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    values = signature.args[0]
    element = ir.FloatType() if values.dtype == types.float32 else ir.HalfType()
    data = make_array(values)(context, builder, args[0]).data
    pair_type = ir.VectorType(element, 2)
    place = builder.bitcast(builder.gep(data, [args[1]]), pair_type.as_pointer())
    pair = builder.load(place, typ=pair_type, align=values.dtype.bitwidth // 8)
    if values.dtype == types.uint16:
        pair = builder.fpext(pair, ir.VectorType(ir.FloatType(), 2))
    lanes = [builder.extract_element(pair, ir.IntType(32)(lane)) for lane in range(2)]
    return context.make_tuple(builder, signature.return_type, lanes)


def _return_argument(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return args[0]


def _extend_half(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())


def _truncate_to_half(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))
