"""Importing this loads and compiles what a store needs at first, for processes forked afterwards.

A process that is killed after some milliseconds would else spend all of its life on that.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tiers.disk import OsDisk
from tiers.policies import policy_class
from tiers.store import Store

policy_class("s3fifo")
with tempfile.TemporaryDirectory() as _made:
    with Store.create(Path(_made) / "store", "2MiB", page_size=4096, disk=OsDisk()) as _store:
        _space = _store.create_space("a", dtype="uint8", row_width=4096, n_rows=40)
        for _first in (0, 20):
            with _store.claim([(_space, np.arange(_first, _first + 20))], write=True):
                pass
        _store.commit()
        _store.demote(_space, np.arange(20))
        _store.commit()
    with Store.open(Path(_made) / "store", "2MiB", read_only=True) as _store:
        _store.fetch(_store.space("a"), np.arange(40))
