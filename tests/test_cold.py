"""The cold tier: packs that plain zarr opens, and pages that survive whatever happens to them."""

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd

from tiers import Budget, Constant, Store
from tiers.backup import backup
from tiers.errors import (
    BudgetError,
    CorruptionError,
    StoreFullError,
    StoreIOError,
    TierError,
    UncommittedError,
)
from tiers.export import export
from tiers.packs import Packs
from tiers.salvage import salvage
from tiers.testing import Fault, FaultDisk, power_cut
from tiers.testing.fault_disk import PowerCut

PAGE = 4096
N_PAGES = 900
BUDGET = "2MiB"
ALL = np.arange(N_PAGES)


def content_of(pages, step=1):
    """Return the bytes of pages, uint8 (n, PAGE): each its own, half of them compressible."""
    pages = np.asarray(pages)
    content = np.empty((len(pages), PAGE), np.uint8)
    for row, page in zip(content, pages.tolist(), strict=True):
        row[:] = np.random.default_rng(page * 64 + step).integers(0, 256, PAGE, np.uint8)
        row[PAGE // 2 :] = page % 251
    return content


def write(store, space, pages, step=1):
    for part in np.array_split(pages, -(-len(pages) // 100)):
        with store.claim([(space, part)], write=True) as claim:
            store.arena[claim.frames[0]] = content_of(part, step)


def differing(store, space, pages, step=1):
    """Return the pages that do not read as they were written."""
    found = []
    for part in np.array_split(pages, -(-len(pages) // 100)):
        with store.claim([(space, part)]) as claim:
            is_same = (store.arena[claim.frames[0]] == content_of(part, step)).all(axis=1)
        found += part[~is_same].tolist()
    return found


PLACE = Path("/machine/store")


def new_disk():
    disk = FaultDisk()
    disk.make_directory(PLACE.parent)
    disk.sync_directory(PLACE.parent.parent)
    return disk


@pytest.fixture
def disk():
    return new_disk()


def make(path, disk=None, n_pages=N_PAGES, budget=BUDGET):
    store = Store.create(path, budget, page_size=PAGE, disk=disk)
    space = store.create_space(
        "pages", dtype="uint8", row_width=PAGE, n_rows=n_pages, initial=Constant(7)
    )
    write(store, space, np.arange(n_pages))
    store.commit()
    return store, space


def commit_twice(store):
    """Commit, and once more: what the first one emptied is removed by the second."""
    store.commit()
    store.commit(meta={"commit": store.commit_number})


def packs_of(store):
    return store._pager.slots.packs


def test_cold_pages_read_right_wherever_they_are_read(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    used_bytes = store.stats()["tiers"]["nvme"]["used_bytes"]
    assert store.demote(space, ALL[::2]) == 450
    assert store.demote(space, ALL[::2]) == 0, "they are cold already"
    assert differing(store, space, ALL) == []
    store.commit()
    store.check()
    stats = store.stats()["tiers"]
    assert stats["nvme"]["used_bytes"] < used_bytes - 400 * PAGE
    assert stats["cold"]["used_bytes"] == 450 * PAGE
    assert stats["cold"]["demoted"] == 450
    store.close()
    for read_only in (True, False):
        with Store.open(path, BUDGET, read_only=read_only) as store:
            space = store.space("pages")
            assert (store.is_cold(space, ALL) == (ALL % 2 == 0)).all()
            assert differing(store, space, ALL) == []
            assert store.stats()["tiers"]["cold"]["pages_read"] >= 450
    with Store.open(path, BUDGET) as store:
        assert store.scrub().damaged == []


def test_packs_open_with_plain_zarr(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[3:700])
    store.commit()
    store.close()
    group = zarr.open_group(path / "cold", mode="r")
    n_slots = 512
    ids = np.concatenate([group["ids"][:n_slots], group["ids"][n_slots : 2 * n_slots]])
    pages = np.concatenate([group["pages"][:n_slots], group["pages"][n_slots : 2 * n_slots]])
    is_there = ids[:, 2] > 0
    assert ids[is_there, 1].tolist() == list(range(3, 700))
    assert (pages[is_there] == content_of(ids[is_there, 1].astype(np.int64))).all()
    assert not pages[~is_there].any()


@settings(max_examples=20)
@given(st.data())
def test_the_reader_of_packs_agrees_with_zarr(data):
    """Pages of any bytes, zeros among them, which zarr leaves out."""
    packs = Packs(new_disk(), PLACE.parent / "cold", PAGE)
    n_pages = data.draw(st.integers(1, packs.n_slots))
    seed = data.draw(st.integers(0, 1 << 32))
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 256, (n_pages, PAGE), np.uint8)
    content[rng.random(n_pages) < 0.3] = data.draw(st.sampled_from((0, 255)))
    pack = data.draw(st.integers(0, 1 << 30))
    packs.write(pack, rng.integers(0, 1 << 63, (n_pages, 4), np.uint64), content)
    rows = np.unique(rng.integers(0, n_pages, 20))
    buffers = [np.full(PAGE, 9, np.uint8) for _ in rows]
    packs.read([packs.first_block(pack) + int(row) for row in rows], buffers)
    by_zarr = packs._arrays()[0][pack * packs.n_slots : (pack + 1) * packs.n_slots]
    assert (np.array(buffers) == by_zarr[rows]).all()
    assert (np.array(buffers) == content[rows]).all()


def test_what_is_written_after_a_demotion_is_what_is_read(tmp_path):
    store, space = make(tmp_path / "store")
    store.demote(space, ALL)
    write(store, space, ALL[::3], step=2)
    assert differing(store, space, ALL[::3], step=2) == []
    store.commit()
    assert differing(store, space, ALL[::3], step=2) == []
    assert differing(store, space, ALL[1::3]) == []
    assert not store.is_cold(space, ALL[::3]).any()
    store.check()
    store.close()


def test_a_demotion_is_undone_by_abort(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL)
    store.abort()
    assert not store.is_cold(space, ALL).any()
    assert packs_of(store).numbers() == []
    assert differing(store, space, ALL) == []
    store.check()
    assert store.demote(space, ALL[:10]) == 10
    store.commit()
    store.check()
    store.close()


def test_what_is_not_committed_does_not_move(tmp_path):
    store, space = make(tmp_path / "store")
    write(store, space, ALL[:10], step=2)
    assert store.demote(space, ALL[:20]) == 10
    store.commit()
    assert store.demote(space, ALL[:20]) == 10
    store.commit()
    assert differing(store, space, ALL[:10], step=2) == []
    store.close()


def test_a_promotion_frees_the_pack(tmp_path):
    store, space = make(tmp_path / "store")
    store.demote(space, ALL[:600])
    store.commit()
    assert packs_of(store).numbers() == [0, 1]
    assert store.promote(space, ALL[:512]) == 512
    store.commit()
    assert packs_of(store).numbers() == [0, 1], "the commit before is whole until the next one"
    store.commit(meta={})
    assert packs_of(store).numbers() == [1], "the first pack is dead"
    assert differing(store, space, ALL) == []
    store.discard(space, 0, N_PAGES)
    commit_twice(store)
    assert packs_of(store).numbers() == []
    assert store.stats()["tiers"]["cold"]["used_bytes"] == 0
    store.check()
    store.close()


def test_a_snapshot_keeps_what_it_needs(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[:300])
    store.commit()
    store.snapshots.take("before")
    write(store, space, ALL[:300], step=2)
    store.demote(space, ALL[300:])
    store.commit()
    store.check()
    with Store.open(path, BUDGET, read_only=True, snapshot="before") as before:
        assert differing(before, before.space("pages"), ALL) == []
    assert differing(store, space, ALL[:300], step=2) == []
    store.snapshots.roll_back("before")
    assert differing(store, space, ALL) == []
    assert store.is_cold(space, ALL).tolist() == [True] * 300 + [False] * 600
    store.check()
    store.snapshots.drop("before")
    write(store, space, ALL[:300], step=3)
    commit_twice(store)
    assert packs_of(store).numbers() == []
    assert store.check()["blocks_lost"] == 0
    store.close()


def test_a_reader_keeps_the_packs_of_its_commit(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[:300])
    store.commit()
    with Store.open(path, BUDGET, read_only=True) as reader:
        write(store, space, ALL[:300], step=2)
        store.commit()
        assert packs_of(store).numbers() == [0]
        store.compact()
        assert packs_of(store).numbers() == [0]
        assert differing(reader, reader.space("pages"), ALL[:300]) == []
    store.compact()
    assert packs_of(store).numbers() == []
    store.close()


def test_compaction_packs_anew_what_is_left_of_worn_packs(tmp_path):
    store, space = make(tmp_path / "store", n_pages=1600)
    pages = np.arange(1600)
    store.demote(space, pages)
    store.commit()
    assert packs_of(store).numbers() == [0, 1, 2, 3]
    write(store, space, pages[pages % 5 > 0], step=2)
    store.commit()
    report = store.compact()
    assert report.pages_repacked == 320
    assert len(packs_of(store).numbers()) == 1
    assert differing(store, space, pages[pages % 5 > 0], step=2) == []
    assert differing(store, space, pages[pages % 5 == 0]) == []
    store.check()
    store.close()


def test_compaction_removes_packs_that_no_commit_knows(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[:20])
    store.commit()
    store.demote(space, ALL[20:40])
    store._files.slots.packs.remove_dead = lambda packs: None
    store.close()
    with Store.open(path, BUDGET) as store:
        assert packs_of(store).numbers() == [0, 1]
        assert store.compact().packs_removed == 1
        assert packs_of(store).numbers() == [0]
        assert differing(store, store.space("pages"), ALL) == []


def test_an_orphan_with_the_number_of_a_new_pack_is_replaced(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[:20])
    store._files.slots.packs.remove_dead = lambda packs: None
    store.close()
    with Store.open(path, BUDGET) as store:
        space = store.space("pages")
        store.demote(space, ALL[50:55])
        store.commit()
        assert packs_of(store).ids(0)[:, 1].max() == 54
        assert packs_of(store).ids(0)[5:].max() == 0
        assert differing(store, space, ALL) == []


def test_backup_and_export_read_cold_pages(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[::2])
    store.commit()
    store.close()
    assert backup(path, tmp_path / "copy") == N_PAGES
    with Store.open(tmp_path / "copy", BUDGET) as copy:
        assert differing(copy, copy.space("pages"), ALL) == []
        assert not copy.is_cold(copy.space("pages"), ALL).any()
    export(path, tmp_path / "out")
    assert (zarr.open_group(tmp_path / "out")["pages"][:] == content_of(ALL)).all()


def test_salvage_finds_cold_pages_without_the_map(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[::2])
    store.commit()
    write(store, space, ALL[::10], step=2)
    store.commit()
    # Cold, then written, in one transaction: the slot is what counts.
    store.demote(space, ALL[1::20])
    write(store, space, ALL[1::20], step=3)
    store.commit()
    top = store._pager.map.entry(16, 2, 0)[0] & ((1 << 48) - 1)
    store.close()
    with (path / "pages").open("r+b") as file:
        file.seek(top * 4096)
        file.write(bytes(4096))
    report = salvage(path, tmp_path / "new")
    assert report.damaged == {} and report.lost == []
    assert report.n_by_tag == report.n_pages == N_PAGES
    with Store.open(tmp_path / "new", BUDGET) as new:
        space = new.space("pages")
        assert differing(new, space, ALL[::10], step=2) == []
        assert differing(new, space, ALL[1::20], step=3) == []
        rest = ALL[(ALL % 10 != 0) & (ALL % 20 != 1)]
        assert differing(new, space, rest) == []


def test_a_flipped_byte_of_a_pack_never_reaches_the_reader(disk):
    path = PLACE
    store, space = make(path, disk, n_pages=40)
    store.demote(space, np.arange(40))
    store.commit()
    store.close()
    tree = disk.files()
    name = path / "cold" / "pages" / "c.0.0"
    size_bytes = tree[name]
    rng = np.random.default_rng(5)
    n_refused = 0
    for at in rng.integers(0, size_bytes, 150).tolist():
        flipped = disk.process()
        file = flipped.open(name, "write", direct=False)
        byte = np.empty(1, np.uint8)
        flipped.read_batch(file, [at], [byte])
        flipped.write_batch(file, [at], [byte ^ np.uint8(1 << int(rng.integers(8)))])
        with Store.open(path, BUDGET, read_only=True, disk=disk) as reader:
            for page in range(40):
                try:
                    with reader.claim([(reader.space("pages"), np.array([page]))]) as claim:
                        found = reader.arena[claim.frames[0]].copy()
                except CorruptionError:
                    n_refused += 1
                else:
                    assert (found == content_of([page])).all()
        flipped.write_batch(file, [at], [byte])
        flipped.close(file)
    assert n_refused >= 100
    with Store.open(path, BUDGET, disk=disk) as store:
        assert differing(store, store.space("pages"), np.arange(40)) == []


@pytest.mark.parametrize("name", ["pages", "ids"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short", "noise"])
def test_a_pack_that_is_lost_is_a_typed_error(tmp_path, name, damage):
    path = tmp_path / "store"
    store, space = make(path, n_pages=40)
    store.demote(space, np.arange(40))
    store.commit()
    store.close()
    file = path / "cold" / name / "c.0.0"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        noise = np.random.default_rng(1).bytes(len(content))
        file.write_bytes({"empty": b"", "short": content[:100], "noise": noise}[damage])
    with Store.open(path, BUDGET) as store:
        space = store.space("pages")
        if name == "pages":
            with pytest.raises(CorruptionError):
                differing(store, space, np.arange(40))
            damaged = store.scrub().damaged
            assert [one.index for one in damaged] == list(range(40))
        else:
            assert differing(store, space, np.arange(40)) == []
            if damage != "gone":
                with pytest.raises(CorruptionError):
                    store._cold.repack([0])


def test_metadata_that_is_lost_harms_nobody_but_zarr(tmp_path):
    path = tmp_path / "store"
    store, space = make(path, n_pages=40)
    store.demote(space, np.arange(40))
    store.commit()
    store.close()
    for file in (path / "cold").rglob("zarr.json"):
        assert json.loads(file.read_text())["zarr_format"] == 3
        file.write_text("{")
    with Store.open(path, BUDGET) as store:
        space = store.space("pages")
        assert differing(store, space, np.arange(40)) == []
        store.promote(space, np.arange(20))
        store.commit()
        store.demote(space, np.arange(10))
        store.commit()
        assert differing(store, space, np.arange(40)) == []
    assert len(list(zarr.open_group(path / "cold", mode="r").array_keys())) == 2


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("action", ["demote", "promote", "repack", "compact"])
def test_every_fault_leaves_the_last_commit(action, persistent):
    """EIO at operation 1, 2, 3, ... until a clean run; then a reopened store is whole."""
    pages = np.arange(30)
    for at in range(1, 400):
        disk = new_disk()
        store, space = make(PLACE, disk, n_pages=30)
        store.demote(space, pages[:20])
        store.commit()
        if action in ("repack", "compact"):
            store.promote(space, pages[:15])
            store.demote(space, pages[20:])
            store.commit()
            store.promote(space, pages[21:])
            store.commit()
        disk.inject(Fault(at, persistent=persistent))
        failed = False
        try:
            if action == "demote":
                store.demote(space, pages)
            elif action == "promote":
                store.promote(space, pages)
            elif action == "repack":
                store._cold.repack([0, 1])
            else:
                store.compact()
            store.commit()
        except TierError:
            failed = True
        is_through = disk.is_armed and not persistent
        disk.inject(None)
        try:
            store.close()
        except StoreIOError:
            assert failed
        with Store.open(PLACE, BUDGET, disk=disk) as store:
            assert differing(store, store.space("pages"), pages) == []
            store.check()
        if is_through or (persistent and not failed):
            assert not failed
            assert at > 5
            return
    raise AssertionError("never a clean run")


@pytest.mark.parametrize("action", ["demote", "repack"])
def test_every_power_cut_leaves_a_commit(action):
    disk = new_disk()
    path, pages = PLACE, np.arange(24)
    store, space = make(path, disk, n_pages=24)
    if action == "repack":
        store.demote(space, pages)
        store.commit()
        write(store, space, pages[:20])
        store.commit()
    first = len(disk.log.operations)
    if action == "demote":
        store.demote(space, pages[::2])
    else:
        store._cold.repack([0])
    store.commit()
    write(store, space, pages[::3])
    store.commit()
    last = len(disk.log.operations)
    assert last - first > 20
    for k in range(first, last + 1):
        for seed in range(4):
            after = power_cut(disk.log, k, np.random.default_rng(seed))
            with Store.open(path, BUDGET, disk=after) as store:
                space = store.space("pages")
                assert differing(store, space, pages) == []
                store.check()
                store.demote(space, pages[1::2])
                store.commit()
                assert differing(store, space, pages) == []
                store.check()


def test_a_kill_in_a_demotion_loses_nothing(disk):
    for k in range(1, 60, 2):
        there = disk.process()
        where = PLACE.with_name(f"store{k}")
        store, space = make(where, there, n_pages=24)
        there.cut_after(k)
        try:
            store.demote(space, np.arange(24))
            store.commit()
            store.close()
        except PowerCut:
            there.power_off()
        with Store.open(where, BUDGET, disk=disk) as store:
            assert differing(store, store.space("pages"), np.arange(24)) == []
            store.check()


def test_the_cold_budget_is_kept(tmp_path):
    store, space = make(tmp_path / "store", budget=Budget(BUDGET, cold=PAGE * 100))
    with pytest.raises(StoreFullError, match="cold budget"):
        store.demote(space, ALL[:101])
    assert not store.is_cold(space, ALL).any()
    assert store.demote(space, ALL[:100]) == 100
    store.commit()
    with pytest.raises(StoreFullError):
        store.demote(space, ALL[100:101])
    store.promote(space, ALL[:50])
    assert store.demote(space, ALL[200:250]) == 50
    store.commit()
    store.check()
    store.close()
    with pytest.raises(BudgetError, match="'much'"):
        Budget(BUDGET, cold="much")


def test_a_full_disk_refuses_a_demotion_and_changes_nothing(disk):
    store, space = make(PLACE, disk)
    disk.capacity_bytes = sum(disk.files().values()) + 10_000
    with pytest.raises(StoreFullError):
        store.demote(space, ALL)
    assert packs_of(store).numbers() == []
    store.commit()
    disk.capacity_bytes = None
    assert differing(store, space, ALL) == []
    store.check()
    assert store.demote(space, ALL) == N_PAGES
    store.commit()
    store.close()


def test_a_store_that_is_being_created_has_no_cold_tier(tmp_path):
    def prepare(store):
        space = store.space("pages")
        write(store, space, ALL[:3])
        store.commit()
        with pytest.raises(UncommittedError):
            store.demote(space, ALL[:3])

    from tiers import SpaceSpec

    spec = SpaceSpec("pages", "uint8", PAGE, N_PAGES, Constant(7))
    Store.create(tmp_path / "store", BUDGET, page_size=PAGE, spaces=[spec], prepare=prepare).close()
    assert not (tmp_path / "store" / "cold").exists()


NUMBERS = st.integers(0, 1 << 64) | st.integers(0, 5000) | st.just((1 << 64) - 1)


@settings(max_examples=60)
@given(st.data())
def test_a_forged_pack_is_refused_or_reads(data):
    """Spans and chunks of any kind behind right checksums: a typed error, and memory is bounded."""

    def sealed(content):
        return content + google_crc32c.value(content).to_bytes(4, "little")

    packs = Packs(new_disk(), PLACE.parent / "cold", PAGE)
    packs.write(0, np.ones((3, 4), np.uint64), content_of([1, 2, 3]))
    chunks = b""
    spans = []
    for _ in range(data.draw(st.integers(0, 4))):
        size_bytes = data.draw(st.sampled_from((0, 10, PAGE, 1 << 26)))
        frame = zstd.compress(np.zeros(size_bytes, np.uint8), 1)
        noise = bytearray(frame)
        if noise and data.draw(st.booleans()):
            noise[data.draw(st.integers(0, len(noise) - 1))] ^= data.draw(st.integers(1, 255))
        spans.append((len(chunks), len(noise) + 4))
        chunks += sealed(bytes(noise))
    while len(spans) < packs.n_slots:
        spans.append((data.draw(NUMBERS) % (1 << 64), data.draw(NUMBERS) % (1 << 64)))
        if len(spans) > 8:
            spans += [((1 << 64) - 1,) * 2] * (packs.n_slots - len(spans))
    content = chunks + sealed(np.array(spans, "<u8").tobytes())
    disk = packs._disk
    disk.unlink(packs._pages_path(0))
    file = disk.open(packs._pages_path(0), "create", direct=False)
    disk.write_batch(file, [0], [np.frombuffer(content, np.uint8)])
    disk.close(file)
    tracemalloc.start()
    try:
        for slot in range(10):
            buffer = np.zeros(PAGE, np.uint8)
            with suppress(CorruptionError):
                packs.read([packs.first_block(0) + slot], [buffer])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
