"""A budget: how many bytes each tier may hold, and the account of what DRAM holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tiers.errors import BudgetError

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "pib": 1 << 50,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "pb": 10**15,
}


def parse_size(size: str | int) -> int:
    """Return a size in bytes, from ``"64MiB"``, ``"1.5 GiB"``, ``"10GB"`` or an integer.

    Raises
    ------
    BudgetError
        For anything else, naming the value.
    """
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise BudgetError(f"a size is a string like '64MiB' or a number of bytes, not {size!r}")
    if isinstance(size, int):
        size_bytes = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
        if match is None or match[2].lower() not in _UNITS:
            raise BudgetError(f"a size is a string like '64MiB' or a number of bytes, not {size!r}")
        number = float(match[1]) * _UNITS[match[2].lower()]
        if not math.isfinite(number):
            raise BudgetError(f"a size of {len(match[1])} digits is no size: {size!r:.40}...")
        size_bytes = int(number)
    if size_bytes <= 0:
        raise BudgetError(f"a size must be positive, not {size!r}")
    return size_bytes


@dataclass(frozen=True)
class Cxl:
    """How much CXL memory there is, and what reaching it costs where it is emulated.

    The defaults are the middle of what is published of CXL 2.0 devices: 140 to 410 ns, 18 to
    52 GB/s.

    Parameters
    ----------
    size : str or int
    latency_ns : float
        From asking for a page to its first byte.
    bandwidth_bytes_s : float

    Raises
    ------
    BudgetError
        If a value is refused, naming it.
    """

    size: str | int
    latency_ns: float = 275.0
    bandwidth_bytes_s: float = 35e9

    def __post_init__(self) -> None:
        parse_size(self.size)
        for name, least in (("latency_ns", 0.0), ("bandwidth_bytes_s", 1.0)):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not least <= value < math.inf:
                raise BudgetError(f"{name} must be a number of at least {least:g}, not {value!r}")

    @property
    def size_bytes(self) -> int:
        return parse_size(self.size)

    def transfer_ns(self, size_bytes: int) -> float:
        """Return how long it takes to reach so many bytes in one piece."""
        return self.latency_ns + size_bytes / self.bandwidth_bytes_s * 1e9


@dataclass(frozen=True)
class Budget:
    """How many bytes each tier may hold.

    Parameters
    ----------
    dram : str or int
        Hard limit of everything the store keeps in memory: frames, cached map nodes, page tables,
        buffers and the bookkeeping of frames, those of the CXL tier too. ``"64MiB"`` or a number of
        bytes.
    cxl : str, int or Cxl, optional
        Frames beside those of DRAM, for pages that give way there. Emulated: memory of this
        machine, and an account of the time that transfers would have taken.
    nvme : str or int, optional
        Most bytes the page file may grow to; as large as the disk allows when left out.
    cold : str or int, optional
        Most bytes of pages, before compression, in packs of the cold tier; migration moves pages
        there when the page file comes near its budget. When left out it moves none, and
        `Store.demote` as many as the disk allows.

    Raises
    ------
    BudgetError
        If a size cannot be understood.
    """

    dram: str | int
    cxl: str | int | Cxl | None = None
    nvme: str | int | None = None
    cold: str | int | None = None

    def __post_init__(self) -> None:
        parse_size(self.dram)
        if self.cxl is not None and not isinstance(self.cxl, Cxl):
            parse_size(self.cxl)
        if self.nvme is not None:
            parse_size(self.nvme)
        if self.cold is not None:
            parse_size(self.cold)

    @property
    def dram_bytes(self) -> int:
        return parse_size(self.dram)

    @property
    def link(self) -> Cxl | None:
        """The CXL memory, None without."""
        return self.cxl if self.cxl is None or isinstance(self.cxl, Cxl) else Cxl(self.cxl)

    @property
    def nvme_bytes(self) -> int | None:
        return None if self.nvme is None else parse_size(self.nvme)

    @property
    def cold_bytes(self) -> int | None:
        return None if self.cold is None else parse_size(self.cold)

    @classmethod
    def of(cls, budget: Budget | str | int) -> Budget:
        """Return `budget` as a `Budget`; a bare size is the DRAM budget."""
        return budget if isinstance(budget, Budget) else cls(dram=budget)


class Account:
    """What the store holds in DRAM, by category, never above the limit.

    Parameters
    ----------
    limit_bytes : int
        The DRAM budget.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self.by_category: dict[str, int] = {}

    def charge(self, category: str, size_bytes: int) -> None:
        """Add `size_bytes` (negative to give back).

        Raises
        ------
        BudgetError
            If the limit would be passed; nothing is charged then.
        """
        if self.used_bytes + size_bytes > self.limit_bytes:
            raise BudgetError(
                f"DRAM budget of {self.limit_bytes} bytes is too small: {category} needs "
                f"{size_bytes} bytes more and {self.limit_bytes - self.used_bytes} are left"
            )
        self.used_bytes += size_bytes
        self.by_category[category] = self.by_category.get(category, 0) + size_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    @property
    def left_bytes(self) -> int:
        return self.limit_bytes - self.used_bytes
