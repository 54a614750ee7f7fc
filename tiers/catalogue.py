"""The catalogue: which spaces a store has, and the small documents that commit with them.

One JSON document, cut into 4 KiB objects of the tree CATALOGUE; its length is in the root.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from tiers.errors import CorruptionError, TierError
from tiers.space import SpaceSpec

CATALOGUE_BYTES_MAX = 1 << 20
DEPTH_MAX = 64


class MetaError(TierError, ValueError):
    """A document that was to be committed is no JSON, or too large."""


@dataclass
class Catalogue:
    """What one commit says of the store.

    Attributes
    ----------
    spaces : dict of int to SpaceSpec
        By number.
    attributes : dict
        The document of whoever built the store (a field keeps its encoding here).
    meta : dict
        The user's document, of the last commit that was given one.
    """

    spaces: dict[int, SpaceSpec] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

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
        content = json.dumps(
            {
                "spaces": {str(number): spec.to_dict() for number, spec in self.spaces.items()},
                "attributes": self.attributes,
                "meta": self.meta,
            },
            allow_nan=False,
            separators=(",", ":"),
        ).encode()
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
            spaces = {
                int(number): SpaceSpec.from_dict(spec)
                for number, spec in document["spaces"].items()
            }
            return cls(spaces, dict(document["attributes"]), dict(document["meta"]))
        except (KeyError, TypeError, ValueError) as broken:
            raise CorruptionError(f"the catalogue cannot be read: {broken!r}") from broken


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
