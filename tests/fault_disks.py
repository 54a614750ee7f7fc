"""A fault disk with a file on it, and what its images hold."""

from pathlib import Path

import numpy as np

from tiers.disk import aligned_buffer
from tiers.testing import FaultDisk, power_cut

PLACE = Path("/place")


def new_disk():
    """Return a disk with a directory, its name durable."""
    disk = FaultDisk()
    disk.make_directory(PLACE)
    disk.sync_directory(Path("/"))
    return disk


def new_file(disk):
    """Return a synced file of two pages of ones, its name durable."""
    file = disk.open(PLACE / "f", "create", direct=True)
    disk.write_batch(file, [0, 4096], aligned(1, 2))
    disk.sync(file)
    disk.sync_directory(PLACE)
    return file


def aligned(value, n_pages=1):
    content = aligned_buffer(n_pages, 4096)
    content[:] = value
    return list(content)


def page(value):
    return bytes([value]) * 4096


def read(disk, file, offset=0):
    (buffer,) = aligned(0)
    disk.read_batch(file, [offset], [buffer])
    return buffer.tobytes()


def images(disk, count=200, k=None):
    length = len(disk.log.operations) if k is None else k
    return [power_cut(disk.log, length, np.random.default_rng(seed)) for seed in range(count)]


def contents(disks, path=PLACE / "f"):
    return {disk.content(path) if disk.exists(path) else None for disk in disks}
