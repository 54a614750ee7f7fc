"""The eviction policies that a store can be given, by name."""

from __future__ import annotations

from importlib import import_module

from tiers.policies.policy import Policy, PolicyError

POLICIES = {
    "clock": "Clock",
    "lru": "Lru",
    "s3fifo": "S3Fifo",
    "s3fifo_adaptive": "S3FifoAdaptive",
    "sieve": "Sieve",
}
"""Name of each policy, which is also its module's, and its class.

`Belady` is not among them: a store does not know the future.
"""


def policy_class(name: str) -> type[Policy]:
    """Return the class of a policy; its module, and with it numba, is imported here.

    Raises
    ------
    PolicyError
        If there is no policy of this name.
    """
    if not isinstance(name, str) or name not in POLICIES:
        raise PolicyError(f"unknown eviction policy {name!r}; known are {', '.join(POLICIES)}")
    found: type[Policy] = getattr(import_module(f"tiers.policies.{name}"), POLICIES[name])
    return found


def policy_of(name: str, n_frames: int) -> Policy:
    """Return a new policy over `n_frames` frames.

    Raises
    ------
    PolicyError
        If there is no policy of this name, or there are no frames.
    """
    return policy_class(name)(n_frames)
