"""Where pages live: a crash-safe page store with a bounded DRAM arena over a page file."""

from tiers.budget import Budget, Cxl, parse_size
from tiers.claims import Claim
from tiers.disk import Disk, OsDisk
from tiers.errors import TierError
from tiers.space import Constant, Space, SpaceSpec, Uniform
from tiers.store import Store
from tiers.watermarks import Migration

__all__ = [
    "Budget",
    "Claim",
    "Constant",
    "Cxl",
    "Disk",
    "Migration",
    "OsDisk",
    "Space",
    "SpaceSpec",
    "Store",
    "TierError",
    "Uniform",
    "parse_size",
]
