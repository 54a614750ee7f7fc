"""What a commit is made of, against slow twins: bits counted, rows summed, named and written."""

import google_crc32c
import numpy as np
import pytest

import tiers.sums
from tiers import OsDisk, books, transfer, wave
from tiers.checksum import bound_crc32c
from tiers.disk import aligned_buffer
from tiers.entries import pack_entry

BLOCK = 4096


def counted(bitmaps, n_blocks, n_bits, first, stop, per_slot):
    """Return what `books.count_free` does, from unpacked bits."""
    bits = np.unpackbits(np.bitwise_or.reduce(bitmaps), bitorder="little")[:n_bits]
    bits[first:stop] = 1
    bits[n_blocks:] = 1
    used = bits.reshape(-1, per_slot).sum(axis=1)
    broken = (used > 0) & (used < per_slot)
    return int((used == 0).sum()), int((per_slot - used[broken].astype(np.int64)).sum())


@pytest.mark.parametrize("per_slot", [1, 2, 8, 16, 64, 128, 256])
def test_free_slots_and_blocks_of_broken_ones_are_counted(per_slot):
    rng = np.random.default_rng(per_slot)
    for n_blocks in (0, 1, per_slot, 1000, 32767, 32768, *rng.integers(0, 32769, 20).tolist()):
        bitmaps = [
            (rng.integers(0, 256, BLOCK) * (rng.random(BLOCK) < share)).astype(np.uint8)
            for share in rng.random(3) * (1, 0.3, 0.1)
        ]
        n_bits = min(-(-n_blocks // per_slot) * per_slot, 32768)
        first = int(rng.integers(0, 4)) * per_slot
        stop = first + int(rng.integers(0, 3)) * per_slot
        found = books.count_free(*bitmaps, n_blocks, n_bits, first, stop, per_slot)
        assert found == counted(bitmaps, n_blocks, n_bits, first, stop, per_slot)


def test_bits_are_cleared_once():
    rng = np.random.default_rng(0)
    bitmap, chosen = rng.integers(0, 256, (2, BLOCK), np.uint8)
    freed = bitmap & chosen
    left = bitmap & ~freed
    assert books.clear_bits(bitmap, freed) == np.bitwise_count(freed).sum()
    assert (bitmap == left).all()
    # What is clear already: nothing changes.
    assert books.clear_bits(bitmap, freed) == -1
    assert (bitmap == left).all()


@pytest.mark.parametrize("calls", [wave.CALLS, None], ids=["compiled", "interpreted"])
def test_nodes_are_named_children_first(monkeypatch, calls):
    monkeypatch.setattr(wave, "CALLS", calls)
    rng = np.random.default_rng(1)
    memory = aligned_buffer(8, BLOCK)
    memory[:] = rng.integers(0, 256, memory.shape)
    twin = memory.copy()
    store_id = rng.bytes(16)
    keys = np.array([[17, 0, 300], [17, 1, 1], [17, 2, 0], [2, 1, 0]])
    rows, blocks = np.array([5, 2, 7, 0]), np.array([9, (1 << 44) - 1, 77, 12])
    parents, places, version = np.array([2, 7, 0, -1]), np.array([44, 1, 1, 0]), (1 << 40) + 70_000
    crcs = tiers.sums.name_rows(
        *(memory, rows, blocks),
        *(tiers.sums.identities_of(store_id, keys, version), parents, places),
    )
    words = twin.view(np.uint64).reshape(8, -1, 2)
    for i, (row, key) in enumerate(zip(rows, keys.tolist(), strict=True)):
        crc = bound_crc32c(twin[row], store_id, *key, version)
        assert crcs[i] == crc
        if parents[i] >= 0:
            words[parents[i], places[i]] = pack_entry(int(blocks[i]), version, crc)
    assert (memory == twin).all()


@pytest.mark.parametrize("calls", [wave.CALLS, None], ids=["compiled", "interpreted"])
def test_rows_are_summed(monkeypatch, calls):
    monkeypatch.setattr(wave, "CALLS", calls)
    rows = np.random.default_rng(2).integers(0, 256, (7, 52), np.uint8)
    assert tiers.sums.sum_rows(rows).tolist() == [google_crc32c.value(row) for row in rows]


@pytest.mark.parametrize("with_tails", [False, True])
@pytest.mark.parametrize("row_bytes", [BLOCK, 65536])
def test_rows_are_written_to_their_places_and_summed(tmp_path, row_bytes, with_tails):
    rng = np.random.default_rng(row_bytes + with_tails)
    disk = OsDisk()
    file = disk.open(tmp_path / "file", "create", direct=True)
    disk.allocate(file, 400 * row_bytes)
    memory = aligned_buffer(300, row_bytes)
    memory[:] = rng.integers(0, 256, memory.shape, np.uint8)
    # Long stretches of neighbours, and single ones, in no order.
    slots = rng.permutation(np.concatenate([np.arange(150), 151 + 2 * np.arange(50)]))
    rows = rng.permutation(300)[: len(slots)]
    tails = rng.integers(0, 1 << 60, (len(rows), 6)).astype(np.uint64) if with_tails else None
    crcs = disk.write_rows(file, slots * row_bytes, memory, rows, tails)
    found = aligned_buffer(len(slots), row_bytes)
    disk.read_batch(file, (slots * row_bytes).tolist(), list(found))
    disk.close(file)
    assert (found == memory[rows]).all()
    for i, row in enumerate(rows.tolist()):
        whole = memory[row].tobytes() + (tails[i].tobytes() if with_tails else b"")
        assert crcs[i] == (google_crc32c.value(whole) if with_tails else 0)


def test_rows_are_not_written_where_there_is_no_wave(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_wave_calls", lambda: None)
    disk = OsDisk()
    file = disk.open(tmp_path / "file", "create", direct=True)
    places = np.zeros(1, np.int64)
    assert disk.write_rows(file, places, aligned_buffer(1, BLOCK), places, None) is None
    assert disk.size(file) == 0
    disk.close(file)
