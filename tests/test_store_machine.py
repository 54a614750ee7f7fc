"""A store driven at random is what the model says, on a disk in memory and on the operating system's."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tiers.disk import OsDisk
from tiers.testing import StoreMachine

STEPS = 30


class BrokenSlotsMachine(StoreMachine):
    """Pages of several blocks, so that slots are broken for map nodes."""

    page_bytes = 16384


class OsMachine(StoreMachine):
    def make_disk(self):
        self.scratch = tempfile.mkdtemp()
        return OsDisk(), Path(self.scratch) / "store"

    def teardown(self):
        super().teardown()
        if hasattr(self, "scratch"):
            shutil.rmtree(self.scratch)


@pytest.mark.parametrize("machine", [StoreMachine, BrokenSlotsMachine, OsMachine])
def test_a_store_is_what_the_model_says(machine):
    case = machine.TestCase()
    case.settings = settings(stateful_step_count=STEPS)
    case.runTest()
