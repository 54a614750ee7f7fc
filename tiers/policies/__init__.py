"""Eviction policies: they choose and never act. Importing this package loads no numba."""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from tiers.policies.policy import STATE_BYTES_MIN, Policy, PolicyError
from tiers.policies.registry import POLICIES, policy_class, policy_of

if TYPE_CHECKING:
    from tiers.policies.belady import Belady
    from tiers.policies.clock import Clock
    from tiers.policies.lru import Lru
    from tiers.policies.s3fifo import S3Fifo
    from tiers.policies.s3fifo_adaptive import S3FifoAdaptive
    from tiers.policies.sieve import Sieve

_COMPILED = {"Belady": "belady", **{_class: _module for _module, _class in POLICIES.items()}}

__all__ = [
    "POLICIES",
    "STATE_BYTES_MIN",
    "Belady",
    "Clock",
    "Lru",
    "Policy",
    "PolicyError",
    "S3Fifo",
    "S3FifoAdaptive",
    "Sieve",
    "policy_class",
    "policy_of",
]


def __getattr__(name: str) -> object:
    if name not in _COMPILED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_COMPILED[name]}"), name)
