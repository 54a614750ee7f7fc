"""The catalogue: which spaces a store has, and the small documents that commit with them.

One JSON document, cut into 4 KiB objects of the tree CATALOGUE; its length is in the root.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from tiers.errors import CorruptionError, TierError
from tiers.root import Root, TreeTop
from tiers.space import SpaceSpec

CATALOGUE_BYTES_MAX = 1 << 20
DEPTH_MAX = 64


class MetaError(TierError, ValueError):
    """A document that was to be committed is no JSON, or too large."""


@dataclass(frozen=True)
class Snapshot:
    """A commit that was given a name: what it takes to read it.

    Attributes
    ----------
    commit, version : int
    catalogue_bytes : int
    spaces, catalogue : TreeTop
        Its trees; the one of the allocator belongs to the newest state alone.
    """

    commit: int
    version: int
    catalogue_bytes: int
    spaces: TreeTop
    catalogue: TreeTop

    @classmethod
    def of(cls, root: Root) -> Snapshot:
        return cls(
            root.commit,
            root.version,
            root.catalogue_bytes,
            root.trees["spaces"],
            root.trees["catalogue"],
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "version": self.version,
            "catalogue_bytes": self.catalogue_bytes,
            "spaces": [self.spaces.word0, self.spaces.word1, self.spaces.depth],
            "catalogue": [self.catalogue.word0, self.catalogue.word1, self.catalogue.depth],
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Snapshot:
        return cls(
            int(document["commit"]),
            int(document["version"]),
            int(document["catalogue_bytes"]),
            TreeTop(*(int(word) for word in document["spaces"])),
            TreeTop(*(int(word) for word in document["catalogue"])),
        )


@dataclass
class Catalogue:
    """What one commit says of the store.

    Attributes
    ----------
    spaces : dict of int to SpaceSpec
        By number.
    allocated : dict of int to int
        By number of a space, how many of its pages `Store.allocate` has given out.
    next_space : int
        Number of the next space; a number is never used twice.
    next_pack, cold_blocks : int
        Number of the next pack of the cold tier, of which none is used twice; blocks of cold slots
        that are used.
    snapshots : dict of str to Snapshot
        By name, in the order of their commits.
    attributes : dict
        The document of whoever built the store (a field keeps its encoding here).
    meta : dict
        The user's document, of the last commit that was given one.
    """

    spaces: dict[int, SpaceSpec] = field(default_factory=dict)
    allocated: dict[int, int] = field(default_factory=dict)
    next_space: int = 0
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    next_pack: int = 0
    cold_blocks: int = 0

    def encode(self) -> bytes:
        """Return the document.

        Raises
        ------
        MetaError
            If something in it is no JSON, or it is longer than 1 MiB.
        """
        for name in ("attributes", "meta"):
            if not isinstance(getattr(self, name), dict):
                raise MetaError(f"{name} must be a dict, not {getattr(self, name)!r}")
            _require_plain(name, getattr(self, name), depth=0)
        document = {
            "spaces": self.outline(),
            "next_space": self.next_space,
            "snapshots": {name: one.to_dict() for name, one in self.snapshots.items()},
            "attributes": self.attributes,
            "meta": self.meta,
        }
        if self.next_pack:
            # Of one length: a commit must not need more room than its transaction reserved.
            document["cold"] = [f"{self.next_pack:012x}", f"{self.cold_blocks:012x}"]
        try:
            content = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        except ValueError as refused:  # an integer of thousands of digits
            raise MetaError(f"the catalogue cannot be written: {refused}") from None
        if len(content) > CATALOGUE_BYTES_MAX:
            raise MetaError(
                f"the catalogue with its meta has {len(content)} bytes of {CATALOGUE_BYTES_MAX}"
            )
        return content

    @classmethod
    def decode(cls, content: bytes) -> Catalogue:
        """Return the catalogue in a document whose checksum was right.

        Raises
        ------
        CorruptionError
            If it is not what `encode` writes.
        """
        try:
            document = json.loads(content)
            return cls(
                *spaces_of(document["spaces"]),
                # Format 1 knew neither.
                int(document.get("next_space", _next_number(document["spaces"]))),
                {
                    name: Snapshot.from_dict(one)
                    for name, one in document.get("snapshots", {}).items()
                },
                dict(document["attributes"]),
                dict(document["meta"]),
                *(int(number, 16) for number in document.get("cold", ("0", "0"))[:2]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as broken:
            raise CorruptionError(f"the catalogue cannot be read: {broken!r}") from broken

    def outline(self) -> dict[str, Any]:
        """Return the spaces as a document."""
        return {
            str(number): {**spec.to_dict(), "allocated": self.allocated.get(number, 0)}
            for number, spec in self.spaces.items()
        }

    @property
    def kept_version(self) -> int:
        """The newest version that a snapshot may refer to; 0 without snapshots."""
        return max((one.version for one in self.snapshots.values()), default=0)


def spaces_of(document: dict[str, Any]) -> tuple[dict[int, SpaceSpec], dict[int, int]]:
    """Return what `Catalogue.outline` was given: spaces, and pages allocated of each."""
    spaces = {int(number): SpaceSpec.from_dict(spec) for number, spec in document.items()}
    allocated = {int(number): int(spec.get("allocated", 0)) for number, spec in document.items()}
    return spaces, {number: count for number, count in allocated.items() if count}


def _next_number(spaces: dict[str, Any]) -> int:
    return 1 + max((int(number) for number in spaces), default=-1)


def _require_plain(where: str, value: Any, depth: int) -> None:
    """Raise unless `value` comes back from JSON as it is, but for tuples, which become lists."""
    if depth > DEPTH_MAX:
        raise MetaError(f"{where} is nested deeper than {DEPTH_MAX}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise MetaError(f"{where} has a key that is no string: {key!r}")
            _require_plain(f"{where}.{key}" if depth < 3 else where, item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _require_plain(where, item, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise MetaError(f"{where} holds {value!r}, which JSON does not know")
    elif value is not None and not isinstance(value, (str, int, bool)):
        raise MetaError(f"{where} holds {value!r}, which JSON does not know")
