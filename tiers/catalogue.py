"""The catalogue: which spaces a store has, and the small documents that commit with them.

One JSON document, cut into 4 KiB objects of the tree CATALOGUE; its length is in the root.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from tiers.allocator import COLD_BLOCK, PACK_BLOCKS
from tiers.errors import CorruptionError, TierError
from tiers.root import CATALOGUE_BYTES_MAX, VERSION_MAX, Root, TreeTop, is_top
from tiers.space import SpaceSpec

DEPTH_MAX = 64
SPACES_MAX = 1 << 31
PACKS_MAX = COLD_BLOCK // PACK_BLOCKS
"""Numbers of spaces; page tables keep them in 32 bits."""
WORD_MAX = (1 << 64) - 1
NOT_A_DOCUMENT = (
    *(AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError),
)
"""What reading a document of another shape raises."""


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
        """Return what `to_dict` was given.

        Raises
        ------
        KeyError, TypeError, ValueError
            If it is none.
        """
        found = cls(
            _integer(document["commit"], VERSION_MAX),
            _integer(document["version"], VERSION_MAX),
            _integer(document["catalogue_bytes"], CATALOGUE_BYTES_MAX),
            TreeTop(*(_integer(word, WORD_MAX) for word in document["spaces"])),
            TreeTop(*(_integer(word, WORD_MAX) for word in document["catalogue"])),
        )
        if not (is_top(found.spaces) and is_top(found.catalogue)):
            raise ValueError(f"no tree begins at {found.spaces} or {found.catalogue}")
        return found


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
            spaces, allocated = spaces_of(document["spaces"])
            # Format 1 knew neither.
            next_space = document.get("next_space", max(spaces, default=-1) + 1)
            snapshots = document.get("snapshots", {})
            for name in ("attributes", "meta"):
                if not isinstance(document[name], dict):
                    raise TypeError(f"{name} is no object")
                _require_plain(name, document[name], depth=0)
            if not max(spaces, default=-1) < _integer(next_space, SPACES_MAX):
                raise ValueError(f"space {max(spaces)} is not below {next_space}")
            return cls(
                spaces,
                allocated,
                next_space,
                {name: Snapshot.from_dict(one) for name, one in snapshots.items()},
                document["attributes"],
                document["meta"],
                *_cold(document.get("cold", ("0", "0"))),
            )
        except NOT_A_DOCUMENT as broken:
            raise CorruptionError(f"the catalogue cannot be read: {broken!r:.300}") from broken

    @classmethod
    def from_outline(cls, document: dict[str, Any]) -> Catalogue:
        """Return what `outline` was given, with attributes if there are any beside it.

        Raises
        ------
        CorruptionError
            If it is none.
        """
        try:
            spaces, allocated = spaces_of(document["spaces"])
            return cls(spaces, allocated, attributes=dict(document.get("attributes", {})))
        except NOT_A_DOCUMENT as broken:
            raise CorruptionError(f"the outline cannot be read: {broken!r:.300}") from broken

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
    """Return what `Catalogue.outline` was given: spaces, and pages allocated of each.

    Raises
    ------
    AttributeError, KeyError, TypeError, ValueError, OverflowError
        If it is none.
    """
    spaces = {int(number): SpaceSpec.from_dict(spec) for number, spec in document.items()}
    counts = (_integer(spec.get("allocated", 0), 1 << 63) for spec in document.values())
    allocated = dict(zip(spaces, counts, strict=True))
    names = {spec.name for spec in spaces.values()}
    if len(names) < len(spaces) or [str(number) for number in spaces] != list(document):
        raise ValueError("two spaces have one name, or a space has no number")
    if not all(0 <= number < SPACES_MAX for number in spaces):
        raise ValueError(f"spaces have numbers of 0 .. {SPACES_MAX - 1}, not {list(spaces)}")
    return spaces, {number: count for number, count in allocated.items() if count}


def _integer(value: object, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"an integer of 0 .. {largest}, not {value!r:.40}")
    return value


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


def _cold(numbers: Any) -> tuple[int, int]:
    """Return the next pack and the used blocks of the cold tier, as `encode` wrote them."""
    next_pack, cold_blocks = (int(number, 16) for number in numbers)
    if not 0 <= next_pack <= PACKS_MAX or not 0 <= cold_blocks <= next_pack * PACK_BLOCKS:
        raise ValueError(f"{cold_blocks} blocks in {next_pack} packs of the cold tier")
    return next_pack, cold_blocks
