"""Vectors of eight lanes: LLVM's vector instructions, under names that kernels can be read by.

A ``Vector`` is a type of numba's compiled code only; it lives in registers. Lanes are float32,
float64, int32, uint32, int64 or uint64. ``+ - *`` work lane by lane, and on whole numbers
``& | ^ << >>`` too; both sides have one type, and ``>>`` brings in zeros. Nothing is contracted or
reordered, so a lane has the bits of the same steps taken alone. LLVM turns a vector that is wider
than the machine's into several.

Places in arrays are in elements, and are not checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final, cast

from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.np.arrayobj import make_array

LANES: Final = 8

_LANE_TYPES = (
    *(types.float32, types.float64),
    *(types.int32, types.uint32, types.int64, types.uint64),
)
_BYTE, _NUMBER, _WORD = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_READ, _KEEP_IN_ALL_CACHES, _DATA = _NUMBER(0), _NUMBER(3), _NUMBER(1)


class Vector(types.Type):
    """The type of eight lanes of `dtype`."""

    def __init__(self, dtype: Any) -> None:
        if dtype not in _LANE_TYPES:
            raise TypingError(f"a vector has lanes of {_LANE_TYPES}, not {dtype}")
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        lane = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(lane, LANES))


_FLOAT32, _INT32, _UINT32, _UINT64 = (
    Vector(dtype) for dtype in (types.float32, types.int32, types.uint32, types.uint64)
)


def _instruction(generator: Callable[..., Any]) -> Callable[..., Any]:
    """Return what kernels call, without the typing context that numba adds as first argument."""
    return cast(Callable[..., Any], intrinsic(generator))


# Operators

_OF_FLOATS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul"}
_OF_INTEGERS = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
    operator.lshift: "shl",
    operator.rshift: "lshr",
}


def _register(operation: Callable[[Any, Any], Any]) -> None:
    @infer_global(operation)
    class _Operation(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                if args[0].dtype in types.real_domain and operation not in _OF_FLOATS:
                    return None
                return signature(args[0], *args)
            return None

    @lower_builtin(operation, Vector, Vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        is_real = sig.return_type.dtype in types.real_domain
        name = (_OF_FLOATS if is_real else _OF_INTEGERS)[operation]
        return getattr(builder, name)(*args)


for _operation in _OF_INTEGERS:
    _register(_operation)

# Making vectors


@_instruction
def splat(typing_context: Any, value: Any) -> Any:
    """Return eight lanes of one value."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return Vector(value)(value), generate


@_instruction
def load(typing_context: Any, array: Any, at: Any) -> Any:
    """Return ``array[at : at + 8]`` of a 1-D array."""
    _require_line("load", array)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = context.get_value_type(sig.return_type)
        place = _place(context, builder, sig.args[0], args[0], args[1])
        return builder.load(builder.bitcast(place, kind.as_pointer()), align=_size_bytes(array))

    return Vector(array.dtype)(array, types.int64), generate


@_instruction
def store(typing_context: Any, array: Any, at: Any, vector: Any) -> Any:
    """Let ``array[at : at + 8]`` be a vector of the array's dtype."""
    _require_line("store", array)
    _require_mutable("store", array)
    if vector != Vector(array.dtype):
        raise TypingError(f"store takes lanes of {array.dtype}, not {vector}")

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1])
        pointer = builder.bitcast(place, args[2].type.as_pointer())
        builder.store(args[2], pointer, align=_size_bytes(array))
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


# Between types


@_instruction
def bits_as(typing_context: Any, vector: Any, example: Any) -> Any:
    """Return the same bits as lanes of the type of `example`, of the same width."""
    if not _are_whole(vector, example) or vector.dtype.bitwidth != example.dtype.bitwidth:
        raise TypingError(f"bits_as takes whole numbers of one width, not {vector}, {example}")

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return args[0]

    return example(vector, example), generate


@_instruction
def wide(typing_context: Any, vector: Any) -> Any:
    """Return uint32 lanes as uint64."""
    _require("wide", vector, _UINT32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(args[0], ir.VectorType(_WORD, LANES))

    return _UINT64(vector), generate


@_instruction
def truncated(typing_context: Any, vector: Any) -> Any:
    """Return int32 lanes: real ones without their fraction, which fit."""
    _require_real("truncated", vector)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], ir.VectorType(_NUMBER, LANES))

    return _INT32(vector), generate


@_instruction
def real_as(typing_context: Any, vector: Any, example: Any) -> Any:
    """Return int32 lanes in the precision of `example`."""
    _require("real_as", vector, _INT32)
    _require_real("real_as", example)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], args[1].type)

    return example(vector, example), generate


@_instruction
def single(typing_context: Any, vector: Any) -> Any:
    """Return real lanes as float32, rounded to the nearest."""
    _require_real("single", vector)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if vector == _FLOAT32:
            return args[0]
        return builder.fptrunc(args[0], ir.VectorType(ir.FloatType(), LANES))

    return _FLOAT32(vector), generate


# Arithmetic


@_instruction
def fma(typing_context: Any, factor: Any, multiplier: Any, addend: Any) -> Any:
    """Return ``factor * multiplier + addend`` of real lanes, rounded once."""
    _require_real("fma", factor)
    if not factor == multiplier == addend:
        raise TypingError(f"fma takes one type, not {factor}, {multiplier}, {addend}")

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.fma.v{LANES}f{factor.dtype.bitwidth}"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, args)

    return factor(factor, multiplier, addend), generate


@_instruction
def at_least_zero(typing_context: Any, vector: Any) -> Any:
    """Return int32 lanes, 0 instead of what is negative."""
    _require("at_least_zero", vector, _INT32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zeros = ir.Constant(args[0].type, [0] * LANES)
        return builder.select(builder.icmp_signed("<", args[0], zeros), zeros, args[0])

    return vector(vector), generate


@_instruction
def wrapped(typing_context: Any, vector: Any, limit: Any) -> Any:
    """Return uint64 lanes, less `limit` where they are not below it."""
    _require("wrapped", vector, _UINT64)
    _require("wrapped", limit, _UINT64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        is_below = builder.icmp_unsigned("<", *args)
        return builder.select(is_below, args[0], builder.sub(*args))

    return vector(vector, limit), generate


# Choosing lanes: a set of lanes is an integer of eight bits, lane 0 the lowest.


@_instruction
def negative(typing_context: Any, vector: Any) -> Any:
    """Return the set of int32 lanes that are negative."""
    _require("negative", vector, _INT32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zeros = ir.Constant(args[0].type, [0] * LANES)
        return _set_of(builder, builder.icmp_signed("<", args[0], zeros))

    return types.int64(vector), generate


@_instruction
def not_zero(typing_context: Any, vector: Any) -> Any:
    """Return the set of whole lanes that are not zero."""
    if not _are_whole(vector):
        raise TypingError(f"not_zero takes lanes of whole numbers, not {vector}")

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zeros = ir.Constant(args[0].type, [0] * LANES)
        return _set_of(builder, builder.icmp_unsigned("!=", args[0], zeros))

    return types.int64(vector), generate


@_instruction
def lowest(typing_context: Any, lanes: Any) -> Any:
    """Return the lowest lane of a set that is not empty."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@_instruction
def where_equal(typing_context: Any, left: Any, right: Any, value: Any) -> Any:
    """Return uint32 lanes: `value` where two others are equal, 0 elsewhere."""
    for vector in (left, right, value):
        _require("where_equal", vector, _UINT32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zeros = ir.Constant(args[2].type, [0] * LANES)
        return builder.select(builder.icmp_unsigned("==", *args[:2]), args[2], zeros)

    return _UINT32(left, right, value), generate


# Lane by lane in memory. Indices come from memory too, where a scalar load takes one instruction,
# and a lane of a register two.


@_instruction
def look_up(typing_context: Any, table: Any, indices: Any, at: Any) -> Any:
    """Return ``table[indices[at + lane]]`` for each lane."""
    _require_line("look_up", table)
    _require_line("look_up", indices)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = ir.Constant(context.get_value_type(sig.return_type), ir.Undefined)
        for lane, place in enumerate(_places(context, builder, sig.args[:2], args)):
            found = builder.insert_element(found, builder.load(place), _NUMBER(lane))
        return found

    return Vector(table.dtype)(table, indices, types.int64), generate


@_instruction
def set_ones(typing_context: Any, marks: Any, indices: Any, at: Any) -> Any:
    """Let ``marks[indices[at + lane]]``, of uint8, be 1 for each lane."""
    _require_line("set_ones", marks)
    _require_mutable("set_ones", marks)
    _require_line("set_ones", indices)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for place in _places(context, builder, sig.args[:2], args):
            builder.store(_BYTE(1), place)
        return context.get_dummy_value()

    return types.void(marks, indices, types.int64), generate


@_instruction
def ask_for(typing_context: Any, values: Any, indices: Any, at: Any) -> Any:
    """Start to load the cache line of ``values[indices[at + lane]]`` for each lane; do not wait."""
    _require_line("ask_for", values)
    _require_line("ask_for", indices)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        hints = [_READ, _KEEP_IN_ALL_CACHES, _DATA]
        pointer = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, *(hint.type for hint in hints)])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        for place in _places(context, builder, sig.args[:2], args):
            builder.call(function, [builder.bitcast(place, pointer), *hints])
        return context.get_dummy_value()

    return types.void(values, indices, types.int64), generate


# Rows of features: a vector holds 8 / n_features of them, one behind the other. The number of
# features is the length of a tuple, so that it is known when code is made.


@_instruction
def rows_at(typing_context: Any, values: Any, places: Any, at: Any, features: Any) -> Any:
    """Return rows as float32 lanes, of which `values` has the features from each place on.

    Parameters
    ----------
    values : 1-D array
        float32, uint16 (the bits of float16) or int16 (the bits of bfloat16).
    places : int64 1-D array
        The first feature of a row lies at ``values[places[at]]``, of the next one at
        ``values[places[at + 1]]``, and so on.
    at : int
    features : tuple of n_features
    """
    _require_line("rows_at", values)
    _require_line("rows_at", places)
    width = features.count
    halves = {types.float32: ir.FloatType(), types.uint16: ir.HalfType(), types.int16: None}
    if values.dtype not in halves:
        raise TypingError(f"rows_at takes float32, uint16 or int16, not {values}")

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        size = values.dtype.bitwidth
        data = make_array(sig.args[0])(context, builder, args[0]).data
        first = _place(context, builder, sig.args[1], args[1], args[2])
        # A row is one number to be loaded; put together they are the features of all.
        row = ir.IntType(size * width)
        packed = ir.Constant(ir.VectorType(row, LANES // width), ir.Undefined)
        for number in range(LANES // width):
            index = builder.load(builder.gep(first, [_WORD(number)]))
            pointer = builder.bitcast(builder.gep(data, [index]), row.as_pointer())
            value = builder.load(pointer, align=size // 8)
            packed = builder.insert_element(packed, value, _NUMBER(number))
        element = halves[values.dtype]
        if element is None:
            bits = builder.bitcast(packed, ir.VectorType(ir.IntType(16), LANES))
            bits = builder.zext(bits, ir.VectorType(_NUMBER, LANES))
            bits = builder.shl(bits, ir.Constant(bits.type, [16] * LANES))
            return builder.bitcast(bits, ir.VectorType(ir.FloatType(), LANES))
        found = builder.bitcast(packed, ir.VectorType(element, LANES))
        if values.dtype == types.float32:
            return found
        return builder.fpext(found, ir.VectorType(ir.FloatType(), LANES))

    return _FLOAT32(values, places, types.int64, features), generate


@_instruction
def spread(typing_context: Any, weights: Any, at: Any, features: Any) -> Any:
    """Return ``weights[at]`` n_features times, then ``weights[at + 1]``, and so on.

    Parameters
    ----------
    weights : float32 1-D array
    at : int
    features : tuple of n_features
    """
    _require_line("spread", weights)
    width = features.count

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1])
        if width == LANES:
            return _splat(builder, builder.load(place))
        kind = ir.VectorType(ir.FloatType(), LANES // width)
        found = builder.load(builder.bitcast(place, kind.as_pointer()), align=4)
        lanes = [lane // width for lane in range(LANES)]
        return _shuffle(builder, found, lanes)

    return _FLOAT32(weights, types.int64, features), generate


# Inside


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, value, _NUMBER(0)), [0] * LANES)


def _shuffle(builder: Any, vector: Any, lanes: list[int]) -> Any:
    undefined = ir.Constant(vector.type, ir.Undefined)
    order = ir.Constant(ir.VectorType(_NUMBER, len(lanes)), lanes)
    return builder.shuffle_vector(vector, undefined, order)


def _set_of(builder: Any, chosen: Any) -> Any:
    return builder.zext(builder.bitcast(chosen, _BYTE), _WORD)


def _place(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    return builder.gep(make_array(array_type)(context, builder, array).data, [at])


def _places(context: Any, builder: Any, arrays: Any, args: Any) -> list[Any]:
    """Return where ``array[indices[at + lane]]`` lies, for each lane."""
    array, indices, at = args
    data = make_array(arrays[0])(context, builder, array).data
    first = _place(context, builder, arrays[1], indices, at)
    loads = [builder.load(builder.gep(first, [_WORD(lane)])) for lane in range(LANES)]
    return [builder.gep(data, [index]) for index in loads]


def _size_bytes(array: Any) -> int:
    return int(array.dtype.bitwidth) // 8


def _require_line(name: str, array: Any) -> None:
    is_line = isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"
    if not is_line:
        raise TypingError(f"{name} takes a contiguous 1-D array, not {array}")


def _require_mutable(name: str, array: Any) -> None:
    if not array.mutable:
        raise TypingError(f"{name} writes, and {array} is read-only")


def _require(name: str, vector: Any, wanted: Vector) -> None:
    if vector != wanted:
        raise TypingError(f"{name} takes {wanted}, not {vector}")


def _require_real(name: str, vector: Any) -> None:
    if not (isinstance(vector, Vector) and vector.dtype in types.real_domain):
        raise TypingError(f"{name} takes lanes of real numbers, not {vector}")


def _are_whole(*vectors: Any) -> bool:
    return all(isinstance(v, Vector) and v.dtype in types.integer_domain for v in vectors)
