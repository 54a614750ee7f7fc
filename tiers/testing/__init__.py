"""What a disk or a change to the store is tested with.

`FaultDisk` records, fails and loses; `power_cut` makes the images that a disk may hold afterwards;
`Model` says what a store must read as; `record` runs random transactions and `check_images` cuts
them off; `StoreMachine` (which needs hypothesis) drives a store against the model. ``python -m
tiers.testing`` checks images by the thousand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiers.testing.clock import VirtualClock
from tiers.testing.crash import (
    Outcome,
    RecoveryCheck,
    RecoveryError,
    check_image,
    check_images,
    replay,
)
from tiers.testing.fault_disk import FaultDisk, PowerCut
from tiers.testing.faults import Fault
from tiers.testing.images import PowerCuts, power_cut
from tiers.testing.log import Log
from tiers.testing.model import Model, State
from tiers.testing.workload import Recording, record

if TYPE_CHECKING:
    from tiers.testing.machine import StoreMachine

__all__ = [
    "Fault",
    "FaultDisk",
    "Log",
    "Model",
    "Outcome",
    "PowerCut",
    "PowerCuts",
    "Recording",
    "RecoveryCheck",
    "RecoveryError",
    "State",
    "StoreMachine",
    "VirtualClock",
    "check_image",
    "check_images",
    "power_cut",
    "record",
    "replay",
]


def __getattr__(name: str) -> Any:
    if name == "StoreMachine":
        from tiers.testing.machine import StoreMachine

        return StoreMachine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
