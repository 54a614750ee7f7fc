"""A space: a virtual array of rows cut into pages, and what a row reads as before it is written."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.errors import SpaceError
from tiers.page_table import DensePageTable, PageTable

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}


@dataclass(frozen=True)
class Constant:
    """Every element of an unwritten row is `value`; `Constant()` is zeros."""

    value: float = 0.0


@dataclass(frozen=True)
class Uniform:
    """Elements of unwritten rows are uniform in [low, high), by (seed, row, element) alone.

    The generator is counter-based: splitmix64's finaliser (Steele, Lea, Flood 2014, *Fast
    splittable pseudorandom number generators*) over seed and element number, top 24 bits scaled in
    float32. So an unwritten page costs no storage and reads the same everywhere.
    """

    low: float
    high: float
    seed: int = 0


Initial = Constant | Uniform


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype holds a value: integers exactly, floats rounded but finite."""
    if not isinstance(value, (int, float)):
        return False
    if dtype.kind == "f":
        # NaN fails every comparison; an integer may be larger than any float.
        return abs(value) <= float(np.finfo(dtype).max)
    if isinstance(value, int):
        return bool(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max)
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


@dataclass(frozen=True)
class SpaceSpec:
    """What a space is; stored in the catalogue.

    Raises
    ------
    SpaceError
        If a value is out of range, naming it.
    """

    name: str
    dtype: str
    row_width: int
    n_rows: int
    initial: Initial

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 200:
            raise SpaceError(f"a space's name has 1 to 200 characters, not {self.name!r}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise SpaceError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        for name in ("row_width", "n_rows"):
            if isinstance(getattr(self, name), bool) or not hasattr(
                getattr(self, name), "__index__"
            ):
                raise SpaceError(f"{name} must be an integer, not {getattr(self, name)!r}")
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.row_width < 1:
            raise SpaceError(f"row_width must be at least 1, not {self.row_width}")
        if not 1 <= self.n_rows <= 1 << 63:
            raise SpaceError(f"n_rows must be in 1 .. 2^63, not {self.n_rows}")
        if not isinstance(self.initial, (Constant, Uniform)):
            raise SpaceError(f"initial must be Constant or Uniform, not {self.initial!r}")
        numbers = (
            (self.initial.value,)
            if isinstance(self.initial, Constant)
            else (self.initial.low, self.initial.high)
        )
        if not all(_fits(number, DTYPES[self.dtype]) for number in numbers):
            raise SpaceError(
                f"the initial value must be finite in {self.dtype}, not {self.initial}"
            )
        if isinstance(self.initial, Uniform):
            if not self.dtype.startswith("float"):
                raise SpaceError(f"a uniform initial value needs a float dtype, not {self.dtype!r}")
            seed = self.initial.seed
            if not hasattr(seed, "__index__") or not 0 <= seed < 1 << 64:
                raise SpaceError(f"seed must be in 0 .. 2^64 - 1, not {seed!r}")

    @property
    def row_bytes(self) -> int:
        return self.row_width * DTYPES[self.dtype].itemsize

    def to_dict(self) -> dict[str, Any]:
        if isinstance(self.initial, Constant):
            initial: dict[str, Any] = {"kind": "constant", "value": self.initial.value}
        else:
            initial = {
                "kind": "uniform",
                "low": self.initial.low,
                "high": self.initial.high,
                "seed": self.initial.seed,
            }
        return {
            "name": self.name,
            "dtype": self.dtype,
            "row_width": self.row_width,
            "n_rows": self.n_rows,
            "initial": initial,
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> SpaceSpec:
        initial = dict(document["initial"])
        kind = initial.pop("kind")
        return cls(
            name=document["name"],
            dtype=document["dtype"],
            row_width=document["row_width"],
            n_rows=document["n_rows"],
            initial=Constant(**initial) if kind == "constant" else Uniform(**initial),
        )


class Space:
    """A space of an open store.

    Attributes
    ----------
    number : int
        Its place in the catalogue.
    spec : SpaceSpec
    rows_per_page, n_pages : int
    table : PageTable
        Which frame holds each resident page; the store's mutex guards it.
    """

    def __init__(self, number: int, spec: SpaceSpec, page_bytes: int) -> None:
        if spec.row_bytes > page_bytes:
            raise SpaceError(
                f"a row of space {spec.name!r} has {spec.row_bytes} bytes and a page {page_bytes}; "
                "a row never crosses a page"
            )
        self.number = number
        self.spec = spec
        self.page_bytes = page_bytes
        self.rows_per_page = page_bytes // spec.row_bytes
        self.n_pages = -(-spec.n_rows // self.rows_per_page)
        self.table: PageTable = DensePageTable(0)

    def __repr__(self) -> str:
        return (
            f"Space({self.name!r}, {self.spec.dtype}, {self.n_rows} rows x {self.row_width}, "
            f"{self.n_pages} pages)"
        )

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.spec.dtype]

    @property
    def row_width(self) -> int:
        return self.spec.row_width

    @property
    def n_rows(self) -> int:
        return self.spec.n_rows

    @property
    def is_dense(self) -> bool:
        """Whether there is a `page_table`; decided at each opening, from the budget."""
        return isinstance(self.table, DensePageTable)

    @property
    def page_table(self) -> npt.NDArray[np.int32]:
        """Frame of each page, int32 (n_pages,), -1 where absent.

        Read it under a claim or in an epoch; never write it.

        Raises
        ------
        SpaceError
            If the budget is too small for a frame number for every page of the space. A claim
            says in `Claim.frames` where its pages are.
        """
        if not isinstance(self.table, DensePageTable):
            raise SpaceError(
                f"space {self.name!r} has {self.n_pages} pages, too many for a page table in this "
                "DRAM budget; take the frames of a claim"
            )
        return self.table.frames

    def fill_initial(self, page: int, content: npt.NDArray[np.uint8]) -> None:
        """Fill a page's bytes with what its unwritten rows read as.

        Parameters
        ----------
        page : int
        content : uint8 (page_bytes,), filled; bytes that belong to no row become zero
        """
        n_elements = self.rows_per_page * self.row_width
        elements = content[: n_elements * self.dtype.itemsize].view(self.dtype)
        content[n_elements * self.dtype.itemsize :] = 0
        initial = self.spec.initial
        if isinstance(initial, Constant):
            value = initial.value if self.dtype.kind == "f" else int(initial.value)
            elements[:] = self.dtype.type(value)
            return
        elements[:] = uniform_at(page * n_elements, n_elements, initial)


def uniform_at(first: int, count: int, initial: Uniform) -> npt.NDArray[np.float32]:
    """Return elements ``first .. first + count - 1`` of the stream of `initial`, float32.

    Elements are counted modulo 2^64: a space of 2^63 rows has more.
    """
    with np.errstate(over="ignore"):
        word = np.arange(count, dtype=np.uint64) + np.uint64((first + 1) % (1 << 64))
        word *= np.uint64(0x9E3779B97F4A7C15)
        word += np.uint64(initial.seed)
        word ^= word >> np.uint64(30)
        word *= np.uint64(0xBF58476D1CE4E5B9)
        word ^= word >> np.uint64(27)
        word *= np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    unit = (word >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    low, high = np.float32(initial.low), np.float32(initial.high)
    return np.asarray(low + unit * (high - low), np.float32)
