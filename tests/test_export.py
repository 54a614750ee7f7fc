"""An export has the bits of the store, for a zarr that knows no dpnc, or it is not there."""

import errno
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tiers import Constant, SpaceSpec, Store, Uniform
from tiers.disk import OsDisk
from tiers.errors import (
    BudgetError,
    CorruptionError,
    SnapshotError,
    SpaceError,
    StoreExistsError,
    StoreFullError,
    StoreIOError,
    StoreNotFoundError,
)
from tiers.export import ExportError, array_name, export
from tiers.space import DTYPES
from tiers.testing import FaultDisk, PowerCut, power_cut
from tiers.testing.model import State, read_page

PAGE_BYTES = 4096
BUDGET = "2MiB"


@st.composite
def specs(draw, name):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    initial = st.sampled_from([Constant(), Constant(7), Constant(1)])
    if dtype.startswith("float"):
        initial |= st.sampled_from([Constant(-0.0), Constant(0.1), Uniform(-1.0, 2.0, seed=3)])
    row_width = draw(st.sampled_from([1, 2, 3, 100, PAGE_BYTES // 8]))
    return SpaceSpec(name, dtype, row_width, draw(st.integers(1, 20_000)), draw(initial))


def write(store, state, name, pages, rng):
    """Write random bytes, NaN and -0 among them, and note them in the state."""
    space = store.space(name)
    for page in pages:
        content = rng.bytes(PAGE_BYTES) if page % 3 else bytes(PAGE_BYTES)
        with store.claim([(space, np.array([page], np.int64))], write=True) as claim:
            store.arena[claim.frames[0]] = np.frombuffer(content, np.uint8)
        state.pages[name, page] = content


def expected_rows(state, spec, first_page, stop_page):
    """Return the rows of these pages as bytes, from the model."""
    row_bytes = spec.row_bytes
    used_bytes = PAGE_BYTES // row_bytes * row_bytes
    pages = (read_page(state, spec.name, page, PAGE_BYTES) for page in range(first_page, stop_page))
    return b"".join(page[:used_bytes] for page in pages)


def assert_exported(group, state):
    for spec in state.specs.values():
        array = group[array_name(spec.name)]
        n_pages = -(-spec.n_rows // (PAGE_BYTES // spec.row_bytes))
        assert array.shape == (spec.n_rows, spec.row_width)
        assert array.dtype == DTYPES[spec.dtype]
        whole = expected_rows(state, spec, 0, n_pages)[: spec.n_rows * spec.row_bytes]
        assert array[:].tobytes() == whole, spec.name


@given(st.tuples(specs("a"), specs("b / c")), st.integers(0, 2**32 - 1))
def test_an_export_has_the_bits_of_the_store(both, seed):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as directory:
        path, target = Path(directory) / "store", Path(directory) / "out.zarr"
        state = State({spec.name: spec for spec in both})
        with Store.create(path, BUDGET, page_size=PAGE_BYTES, spaces=both) as store:
            for space in store.spaces:
                n_written = int(rng.integers(0, min(10, space.n_pages) + 1))
                pages = rng.choice(space.n_pages, n_written, replace=False).tolist()
                write(store, state, space.name, pages, rng)
            store.commit(attributes={"of": "the store"})
        report = export(path, target)
        group = zarr.open_group(target, mode="r")
        assert dict(group.attrs) == {"of": "the store"}
        assert_exported(group, state)
        on_disk = [file for file in target.rglob("c.*") if file.is_file()]
        assert report.n_chunks == len(on_disk)
        assert report.size_bytes == sum(file.stat().st_size for file in on_disk)


@pytest.fixture
def made(tmp_path):
    """A store with a small space, and what is in it."""
    spec = SpaceSpec("a", "float32", 4, 3000, Constant(2.5))
    state = State({"a": spec})
    with Store.create(tmp_path / "store", BUDGET, page_size=PAGE_BYTES, spaces=[spec]) as store:
        write(store, state, "a", [0, 4, 11], np.random.default_rng(1))
        store.commit()
    return tmp_path / "store", state


def test_a_virtual_space_is_exported_by_what_is_written(tmp_path):
    spec = SpaceSpec("huge", "float16", 8, 1 << 60, Constant(0.5))
    state = State({"huge": spec})
    n_pages = (1 << 60) // 256
    with Store.create(tmp_path / "store", BUDGET, page_size=PAGE_BYTES, spaces=[spec]) as store:
        pages = [1, n_pages // 3, n_pages - 1]
        write(store, state, "huge", pages, np.random.default_rng(2))
        store.commit()
    calls = []
    report = export(
        tmp_path / "store", tmp_path / "out", progress=lambda *counts: calls.append(counts)
    )
    assert report.n_chunks == 3
    assert calls == [(1, 3), (2, 3), (3, 3)]
    array = zarr.open_group(tmp_path / "out", mode="r")["huge"]
    assert array.shape == (1 << 60, 8)
    for page in pages:
        found = array[page * 256 : (page + 1) * 256]
        assert found.tobytes() == expected_rows(state, spec, page, page + 1)
    assert (array[1 << 40 : (1 << 40) + 5] == 0.5).all(), "a chunk that is not there"


def test_chunks_of_many_pages_and_of_pages_larger_than_usual(tmp_path):
    for page_bytes in (PAGE_BYTES, 1 << 20):
        path, target = tmp_path / f"store {page_bytes}", tmp_path / f"out {page_bytes}"
        with Store.create(path, "32MiB", page_size=page_bytes) as store:
            space = store.create_space("a", dtype="uint32", row_width=1, n_rows=(9 << 20) // 4)
            for page in range(0, space.n_pages, 2):
                with store.claim([(space, np.array([page]))], write=True) as claim:
                    store.arena[claim.frames[0]].view(np.uint32)[:] = 0
                    frame = store.arena[claim.frames[0][0]].view(np.uint32)
                    frame[:] = np.arange(frame.size) + page * frame.size
            store.commit()
        report = export(path, target, budget="32MiB")
        array = zarr.open_group(target, mode="r")["a"]
        assert report.n_chunks == 3
        assert array.chunks == ((4 << 20) // 4, 1)
        rows = np.arange(array.shape[0], dtype=np.uint32)
        rows[rows // (page_bytes // 4) % 2 == 1] = 0
        np.testing.assert_array_equal(array[:, 0], rows)


def test_uniform_rows_are_written_out_up_to_a_bound(tmp_path):
    spec = SpaceSpec("u", "float32", 16, 200_000, Uniform(-1.0, 1.0, seed=9))
    state = State({"u": spec})
    path, target = tmp_path / "store", tmp_path / "out"
    with Store.create(path, BUDGET, page_size=PAGE_BYTES, spaces=[spec]) as store:
        write(store, state, "u", [3], np.random.default_rng(3))
        store.commit()
    with pytest.raises(ExportError, match="12,800,000 bytes") as refused:
        export(path, target, materialised_max="12MiB")
    assert refused.value.size_bytes == 12_800_000
    assert sorted(tmp_path.iterdir()) == [path]
    calls = []
    export(path, target, materialised_max="13MiB", progress=lambda *done: calls.append(done))
    assert_exported(zarr.open_group(target, mode="r"), state)
    assert calls[-1] == (3125, 3125)


def test_one_space_is_exported_alone_and_a_wrong_name_names_the_others(tmp_path):
    spaces = [SpaceSpec(name, "uint8", 1, 10, Constant()) for name in ("a", "b")]
    Store.create(tmp_path / "store", BUDGET, spaces=spaces).close()
    assert export(tmp_path / "store", tmp_path / "one", space="b").arrays == {"b": "b"}
    assert list(zarr.open_group(tmp_path / "one", mode="r")) == ["b"]
    with pytest.raises(SpaceError, match="'a', 'b'"):
        export(tmp_path / "store", tmp_path / "none", space="c")
    with pytest.raises(SnapshotError, match="'before'"):
        export(tmp_path / "store", tmp_path / "none", snapshot="before")
    with pytest.raises(BudgetError, match="nonsense"):
        export(tmp_path / "store", tmp_path / "none", materialised_max="nonsense")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".", "__x", "zarr.json", "a\\b", "é", "100 %", "c/0"]
)
def test_any_name_of_a_space_finds_an_array(tmp_path, name):
    spaces = [SpaceSpec(one, "uint8", 1, 10, Constant(5)) for one in (name, "plain")]
    Store.create(tmp_path / "store", BUDGET, spaces=spaces).close()
    report = export(tmp_path / "store", tmp_path / "out")
    group = zarr.open_group(tmp_path / "out", mode="r")
    assert sorted(group) == sorted(report.arrays.values())
    array = group[report.arrays[name]]
    assert (array[:] == 5).all()
    assert array.attrs["name"] == name
    assert report.arrays["plain"] == "plain"


def test_names_that_look_alike_do_not_meet():
    names = ["a/b", "a%2Fb", "__a", "%5F_a", "..", "%2E%2E", "zarr.json", "zarr%2Ejson"]
    assert len({array_name(name) for name in names}) == len(names)


def test_an_export_stays_at_its_commit_while_a_writer_goes_on(made, tmp_path):
    path, state = made
    before = state.copy()
    rng = np.random.default_rng(4)
    with Store.open(path, BUDGET) as writer:

        def go_on(n_done, n_pages):
            for _ in range(3):
                write(writer, state, "a", range(12), rng)
                writer.commit()

        export(path, tmp_path / "out", progress=go_on)
        writer.check()
    assert_exported(zarr.open_group(tmp_path / "out", mode="r"), before)
    assert state.pages != before.pages


def test_a_snapshot_is_exported_as_it_was(made, tmp_path):
    path, state = made
    before = state.copy()
    with Store.open(path, BUDGET) as store:
        number = store.snapshots.take("before")
        write(store, state, "a", range(12), np.random.default_rng(5))
        store.commit()
    report = export(path, tmp_path / "then", snapshot="before")
    assert report.commit == number
    assert_exported(zarr.open_group(tmp_path / "then", mode="r"), before)
    export(path, tmp_path / "now")
    assert_exported(zarr.open_group(tmp_path / "now", mode="r"), state)


def test_a_damaged_page_is_refused_and_nothing_is_left(made, tmp_path):
    path, state = made
    content = (path / "pages").read_bytes()
    at = content.index(state.pages["a", 11])
    (path / "pages").write_bytes(content[: at + 9] + b"!" + content[at + 10 :])
    with pytest.raises(CorruptionError):
        export(path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path]


def test_what_stands_at_the_target_stays(made, tmp_path):
    path, _ = made
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(StoreExistsError, match="out"):
        export(path, target)
    assert target.read_text() == "mine"
    with pytest.raises(StoreNotFoundError, match="nowhere"):
        export(path, tmp_path / "nowhere" / "out")
    with pytest.raises(StoreNotFoundError, match="no-store"):
        export(tmp_path / "no-store", tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == [target, path]


class FailingDisk(OsDisk):
    """The operating system, until the target is being written."""

    def __init__(self, failing, failure):
        super().__init__()
        self.failing, self.failure = failing, failure

    def write_batch(self, file, offsets, buffers, **options):
        self.strike("write_batch", file.path)
        super().write_batch(file, offsets, buffers, **options)

    def sync(self, file):
        self.strike("sync", file.path)
        super().sync(file)

    def sync_directory(self, path):
        self.strike("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source, target):
        self.strike("rename", target)
        super().rename(source, target)

    def strike(self, kind, path):
        if kind == self.failing and "store" not in path.parts:
            raise self.failure


@pytest.mark.parametrize("kind", ["write_batch", "sync", "sync_directory", "rename"])
@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "no space"), StoreFullError),
        (OSError(errno.EIO, "broken"), StoreIOError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_and_nothing_is_left(
    made, tmp_path, kind, failure, raised
):
    path, _ = made
    with pytest.raises(raised):
        export(path, tmp_path / "out", disk=FailingDisk(kind, failure))
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_name_appears_durably_or_not_at_all(tmp_path):
    """Whatever the moment of a power cut, what stands at the target is whole."""
    path, target = Path("/machine/store"), Path("/machine/out")
    disk = FaultDisk()
    disk.make_directory(path.parent)
    disk.sync_directory(Path("/"))
    spec = SpaceSpec("a", "float32", 4, 3000, Constant(2.5))
    state = State({"a": spec})
    with Store.create(path, BUDGET, page_size=PAGE_BYTES, spaces=[spec], disk=disk) as store:
        write(store, state, "a", [0, 4, 11], np.random.default_rng(1))
        store.commit()
    begun = len(disk.log.operations)
    export(path, target, disk=disk)
    whole = files_below(disk, target)
    assert set(whole) == {"zarr.json", "a/zarr.json", "a/c.0.0"}
    for name, content in whole.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    assert_exported(zarr.open_group(tmp_path / "out", mode="r"), state)
    rng = np.random.default_rng(6)
    outcomes = set()
    end = len(disk.log.operations)
    for k in range(begun, end + 1):
        for _ in range(20):
            found = files_below(power_cut(disk.log, k, rng), target)
            # What has returned is durable.
            assert found == whole or (k < end and not found)
            outcomes.add(bool(found))
    assert outcomes == {True, False}


def test_a_process_that_dies_leaves_nothing_under_the_name():
    path, target = Path("/machine/store"), Path("/machine/out")
    first = FaultDisk()
    first.make_directory(path.parent)
    spec = SpaceSpec("a", "uint8", 4, 3000, Constant(2))
    Store.create(path, BUDGET, page_size=PAGE_BYTES, spaces=[spec], disk=first).close()
    for cut in range(1000):
        disk = first.twin()
        disk.cut_after(cut)
        try:
            export(path, target, disk=disk)
        except PowerCut:
            disk.power_off()
            assert files_below(disk, target).keys() in ({}.keys(), {"zarr.json", "a/zarr.json"})
            continue
        break
    assert 5 < cut < 999


def files_below(disk, target):
    return {
        str(path.relative_to(target)): disk.content(path)
        for path in disk.files()
        if path.is_relative_to(target)
    }


READER = """
import sys, zarr
array = zarr.open_group(sys.argv[1], mode="r")["a"]
assert not {"tiers", "dpnc"} & set(sys.modules)
sys.stdout.buffer.write(array[:].tobytes())
"""


def test_a_process_without_dpnc_reads_it(made, tmp_path):
    path, state = made
    export(path, tmp_path / "out")
    command = [sys.executable, "-c", READER, str(tmp_path / "out")]
    found = subprocess.run(command, check=True, capture_output=True, cwd=tmp_path).stdout
    assert found == expected_rows(state, state.specs["a"], 0, 12)[: 3000 * 16]


def test_zarr_is_loaded_when_it_is_needed():
    code = "import sys, tiers.export; sys.exit('zarr' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
