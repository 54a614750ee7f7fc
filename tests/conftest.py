"""Settings that hold for every test: the hypothesis profiles."""

import os

from hypothesis import HealthCheck, Phase, settings

# Deadlines time the machine, and a kernel's first call compiles it. A plain `pytest` tries the same
# examples every time: what it says is about the code. "explore" and "nightly" try others.
settings.register_profile("dev", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("explore", max_examples=25, deadline=None, print_blob=True)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    max_examples=2000,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
