"""Long runs of checks from the command line: progress, violations as they come, an honest end."""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

SECONDS_A_LINE = 60.0


class ViolationError(AssertionError):
    """Something is not as it must be; the message says how to see it again.

    Attributes
    ----------
    command : str
        What shows it again.
    reason : str
    """

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"{reason}\nagain: python -m tiers.testing {command}")
        self.command = command
        self.reason = reason

    def __reduce__(self) -> tuple[type[ViolationError], tuple[str, str]]:
        return ViolationError, (self.command, self.reason)


class HungError(BaseException):
    """A check took so long that it hangs; no handler of errors may catch it."""


@dataclass
class Outcome:
    """What one check found.

    Attributes
    ----------
    counts : Counter
        What happened, by words; the summary adds them up.
    violation : ViolationError or None
    """

    counts: Counter[str] = field(default_factory=Counter)
    violation: ViolationError | None = None


def run(
    console: Console, what: str, outcomes: Generator[Outcome, None, None], n_wanted: int
) -> int:
    """Show progress and every violation, then a table of what happened.

    Into a file, a line a minute.

    Returns
    -------
    int
        0; 1 if there were violations; 130 if Ctrl-C ended it.
    """
    began = time.monotonic()
    counts: Counter[str] = Counter()
    n_done = n_violations = 0
    end = ""
    told = began
    try:
        for outcome in track(outcomes, what, n_wanted, console=console):
            n_done += 1
            counts += outcome.counts
            if outcome.violation is not None:
                n_violations += 1
                console.print(str(outcome.violation), markup=False)
            if not console.is_terminal and time.monotonic() > told + SECONDS_A_LINE:
                # A bar is drawn for terminals only.
                told = time.monotonic()
                console.print(f"{n_done} of {n_wanted} {what}, {n_violations} violations so far")
    except KeyboardInterrupt:
        end = ", interrupted"
        outcomes.close()
    seconds = max(time.monotonic() - began, 1e-9)
    for words in sorted(counts):
        console.print(f"{counts[words]:>12,}  {words}", markup=False)
    rate = f"{n_done / seconds:.1f} a second"
    console.print(f"{n_done} of {n_wanted} {what}, {n_violations} violations, {rate}{end}")
    if end:
        return 130
    return 1 if n_violations else 0


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``python -m tiers.testing <name>``."""
    return argparse.ArgumentParser(
        prog=f"python -m tiers.testing {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_memory(more_bytes: int) -> None:
    """Let this process map so much more than it has; then what it asks for is refused."""
    with open("/proc/self/statm") as sizes:  # noqa: PTH123 - one number of the system's
        mapped_bytes = int(sizes.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + more_bytes, hard))


@contextmanager
def not_longer_than(seconds: float) -> Iterator[None]:
    """Raise `HungError` in the main thread if the block takes longer.

    Not where somebody else, pytest for one, uses the timer already.
    """
    is_free = signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    if not is_free:
        yield
        return

    def hang(number: int, frame: object) -> None:
        faulthandler.dump_traceback()
        raise HungError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
