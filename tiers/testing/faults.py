"""What can go wrong with an operation on a disk."""

from __future__ import annotations

import errno
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tiers.testing.file_system import os_error
from tiers.testing.log import Betrayal, Write

Kind = Literal[
    "make_directory",
    "list_directory",
    "open",
    "size",
    "read",
    "write",
    "allocate",
    "sync",
    "truncate",
    "lock",
    "rename",
    "unlink",
    "sync_directory",
]
KINDS: tuple[Kind, ...] = (
    "make_directory",
    "list_directory",
    "open",
    "size",
    "read",
    "write",
    "allocate",
    "sync",
    "truncate",
    "lock",
    "rename",
    "unlink",
    "sync_directory",
)
"""What a fault can strike. `exists` and `close` do not fail."""

Silent = Literal["lose", "forget", "reorder", "misdirect", "flip", "stale", "delay"]
STRIKES: dict[Silent, tuple[Kind, ...]] = {
    "lose": ("write", "allocate", "truncate", "sync", "rename", "unlink", "sync_directory"),
    "forget": ("make_directory", "open", "write", "allocate", "truncate", "rename", "unlink"),
    "reorder": ("write",),
    "misdirect": ("read", "write"),
    "flip": ("read", "write"),
    "stale": ("read",),
    "delay": KINDS,
}
"""What each fault that raises nothing can strike."""
ERRORS: tuple[int | type[BaseException], ...] = (errno.EIO, errno.ENOSPC, MemoryError)
BLOCK_BYTES = 4096


@dataclass
class Fault:
    """What goes wrong, and when.

    An error is raised, or the operation is acknowledged and something else is done:

    ============= ==================================================================================
    silent        what is done
    ============= ==================================================================================
    ``lose``      nothing: a write leaves the old bytes, an allocation the old length, a sync all
                  that waited for it in doubt, a rename or unlink the old names
    ``forget``    what was asked for, but it is gone when the power goes off, whatever was synced: a
                  write, a growth, a directory entry (``open`` to create, ``make_directory``,
                  ``rename``, ``unlink``)
    ``reorder``   the write, but the next sync passes it by: a power cut may lose it and keep what
                  was written and synced after it
    ``misdirect`` the write, or the read, `displacement_bytes` further on
    ``flip``      the write, or the read, with one bit turned over: number `bit` of the buffer
    ``stale``     the read, of the bytes before they were last written
    ``delay``     what was asked for, `delay_us` later
    ============= ==================================================================================

    Torn and lost writes that were not synced are what `tiers.testing.power_cut` makes anyway.

    Parameters
    ----------
    at : int
        Strikes at the at-th operation of `kinds` from now on; 1 is the next one.
    error : int or type of exception
        The `errno` of the `OSError` that is raised, or what is raised, `MemoryError` for one. A
        write that fails has put the first half of its buffers down.
    persistent : bool
        Whether every later operation of `kinds` is struck, too.
    kinds : collection of str
        What can be struck and is counted; everything that it can strike by default.
    silent : str, optional
        See above; takes the place of the error.
    displacement_bytes : int
    bit : int
        Modulo the bits of the buffer.
    buffer : int
        Which buffer of a batch is struck, modulo how many it has.
    delay_us : int
        Microseconds by which the disk's clock moves on when this strikes, errors included.

    Raises
    ------
    ValueError
        If such a fault could never strike, or would change nothing.
    """

    at: int = 1
    error: int | type[BaseException] = errno.EIO
    persistent: bool = False
    kinds: Collection[Kind] = ()
    silent: Silent | None = None
    displacement_bytes: int = 0
    bit: int = 0
    buffer: int = 0
    delay_us: int = 0

    def __post_init__(self) -> None:
        if self.silent is not None and self.silent not in STRIKES:
            raise ValueError(f"silent is one of {', '.join(STRIKES)} or None, not {self.silent!r}")
        can_strike = KINDS if self.silent is None else STRIKES[self.silent]
        self.kinds = tuple(self.kinds) or can_strike
        if not set(self.kinds) <= set(can_strike):
            raise ValueError(
                f"{self.silent or 'an error'} strikes {', '.join(can_strike)}, not {self.kinds!r}"
            )
        if self.silent == "misdirect" and self.displacement_bytes == 0:
            raise ValueError("a misdirected transfer needs displacement_bytes other than 0")
        if self.at < 1:
            raise ValueError(f"at counts from 1, the next operation, and is not {self.at}")
        if self.delay_us < 0 or (self.silent == "delay" and self.delay_us == 0):
            raise ValueError(f"delay_us must be positive, not {self.delay_us}")

    @classmethod
    def matrix(cls) -> list[Fault]:
        """Return one fault of each sort for each kind of operation that it can strike."""
        errors = [cls(error=error, kinds=(kind,)) for error in ERRORS for kind in KINDS]
        return errors + [
            cls(
                silent=silent,
                kinds=(kind,),
                displacement_bytes=BLOCK_BYTES if silent == "misdirect" else 0,
                delay_us=1000 if silent == "delay" else 0,
            )
            for silent, kinds in STRIKES.items()
            for kind in kinds
        ]

    @classmethod
    def random(cls, rng: np.random.Generator, at_max: int) -> Fault:
        """Return a fault of the matrix that strikes at one of the first `at_max` operations.

        Parameters
        ----------
        rng : numpy.random.Generator
            The same state of the generator gives the same fault.
        at_max : int
        """
        matrix = cls.matrix()
        fault = matrix[int(rng.integers(len(matrix)))]
        blocks = int(rng.integers(1, 64)) * (1 if rng.random() < 0.5 else -1)
        return replace(
            fault,
            at=int(rng.integers(1, at_max + 1)),
            persistent=bool(rng.random() < 0.25),
            displacement_bytes=blocks * BLOCK_BYTES if fault.displacement_bytes else 0,
            bit=int(rng.integers(1 << 24)),
            buffer=int(rng.integers(64)),
            delay_us=int(rng.integers(1, 1_000_000)) if fault.delay_us else 0,
        )

    def failure(self, path: Path) -> BaseException:
        """Return what is raised when this strikes."""
        if isinstance(self.error, int):
            return os_error(self.error, path)
        return self.error(f"injected at {path}")

    def flipped(self, content: bytes) -> bytes:
        """Return bytes with one bit turned over."""
        if not content:
            return content
        which, bit = divmod(self.bit % (8 * len(content)), 8)
        return content[:which] + bytes([content[which] ^ 1 << bit]) + content[which + 1 :]

    def spoilt_write(
        self, change: tuple[Write, Betrayal | None] | None
    ) -> tuple[Write, Betrayal | None] | None:
        """Return what this makes of a write that it strikes, None for nothing at all."""
        if change is None or self.silent == "lose":
            return None
        write, betrayal = change
        if self.silent == "forget":
            return write, "forgotten"
        if self.silent == "reorder":
            return write, betrayal or "late"
        if self.silent == "flip":
            return Write(write.inode, write.offset, self.flipped(write.content)), betrayal
        if self.silent == "misdirect":
            # A place before the file's beginning does not exist; the device has but this one.
            offset = max(0, write.offset + self.displacement_bytes)
            return Write(write.inode, offset, write.content), betrayal
        return change
