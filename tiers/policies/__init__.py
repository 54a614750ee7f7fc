"""Eviction policies: they choose and never act."""

from tiers.policies.clock import Clock
from tiers.policies.policy import Policy

__all__ = ["Clock", "Policy"]
