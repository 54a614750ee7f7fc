"""A memory cgroup (version 1), which bounds what a process may hold, page cache included."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/sys/fs/cgroup/memory")


def refusal() -> str | None:
    """Return why no group can be made here; None if one can."""
    if not (MEMORY / "memory.limit_in_bytes").exists():
        return f"there is no memory cgroup (version 1) at {MEMORY}"
    if not os.access(MEMORY, os.W_OK):
        return f"{MEMORY} cannot be written by this user"
    return None


@contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """Make a group for the processes of a block; yield the file that takes their numbers."""
    group = MEMORY / f"page-faults-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group / "cgroup.procs"
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    # What is left of the page cache keeps a group alive until it is dropped.
    for attempt in range(50):
        (group / "memory.force_empty").write_text("0")
        try:
            group.rmdir()
            return
        except OSError:
            if attempt == 49:
                raise
            time.sleep(0.1)
