"""The fused multiply-add: one rounding, on every machine and at every vector width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError
from numba.extending import intrinsic


def _generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
    return builder.fma(*args)


@intrinsic
def _fma(typing_context: Any, factor: Any, multiplier: Any, addend: Any) -> Any:
    if not factor == multiplier == addend == types.float32:
        raise TypingError(f"fma takes three float32, not {factor}, {multiplier}, {addend}")
    return types.float32(factor, multiplier, addend), _generate


fma: Final = cast(Callable[[np.float32, np.float32, np.float32], np.float32], _fma)
"""float32 ``factor * multiplier + addend``, rounded once (IEEE 754-2019, section 5.4.1).

Plain ``a * b + c`` is two roundings, or one if the compiler likes; this is always one. So a loop
over it has the same bits in scalar code, in the body of a vector loop and in its tail.
"""
