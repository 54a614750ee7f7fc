"""What of an image a store has looked at, and which images are the same as far as it looks.

One thread opens a store and reads it, with no clock and no chance in what it does. So its course,
and what it finds, depend on the names of the files and on the lengths and chunks that it reads, and
on nothing else of the image. Of two images that agree in all that a store has looked at in one of
them, it finds in the other one what it found there::

    known images   names -> step
    step           look -> answer -> next step;  what was found by the runs that ended here

Looks are compared with the image as the power cut left it. What a run wrote itself and reads again
is the same in both, if they agree so far.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tiers.testing.file_system import Look
from tiers.testing.images import Answer, Remains

Finding = int | None
"""The number of the state that a store was in, None for a creation that had not ended."""


class KnownImages:
    """Images of one recording that were opened and read, by what was looked at of them."""

    def __init__(self) -> None:
        self._first_steps: dict[tuple[object, ...], _Step] = {}

    def add(self, remains: Remains, looks: Sequence[Look], finding: Finding) -> None:
        """Note what was found in an image of which a run has looked at `looks`, and no more."""
        step = self._first_steps.setdefault(_names(remains), _Step())
        for look in looks:
            # What is in a file that the run made is its own doing.
            if remains.has_file(look[0]):
                answers = step.answers.setdefault(look, {})
                step = answers.setdefault(remains.answer(look), _Step())
        step.findings.add(finding)

    def findings(self, remains: Remains, allowed: Collection[Finding]) -> set[Finding]:
        """Return what of `allowed` is known to be found in an image; nothing if it is not known."""
        first_step = self._first_steps.get(_names(remains))
        steps = [] if first_step is None else [first_step]
        while steps:
            step = steps.pop()
            found = step.findings.intersection(allowed)
            if found:
                return found
            for look, answers in step.answers.items():
                next_step = answers.get(remains.answer(look))
                if next_step is not None:
                    steps.append(next_step)
        return set()


class _Step:
    """Where a run is after some looks and their answers."""

    __slots__ = ("answers", "findings")

    def __init__(self) -> None:
        self.answers: dict[Look, dict[Answer, _Step]] = {}
        self.findings: set[Finding] = set()


def _names(remains: Remains) -> tuple[object, ...]:
    return tuple(
        (inode, tuple(sorted(entries.items())))
        for inode, entries in sorted(remains.directories.items())
    )
