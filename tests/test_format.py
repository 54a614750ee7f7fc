"""Stores that earlier versions wrote open, read right, and go on.

`python tests/test_format.py TARGET.zip` writes a sample with the present version; the samples that
are kept in tests/data were written when their format was the newest, and are never written again.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tiers import Constant, Store, Uniform
from tiers.errors import FormatVersionError, SalvageError
from tiers.root import FORMAT_VERSION, FORMAT_VERSION_COLD, FORMATS_READ
from tiers.salvage import salvage
from tiers.space import uniform_at

SAMPLES = Path(__file__).parent / "data"
PAGE_BYTES = 4096
N_PAGES = 600
STEPS = (1, 2, 3)
BUDGET = "2MiB"


def pages_of(step):
    return np.arange(step - 1, N_PAGES, 37 * step)


def content_of(page):
    """Return the byte that fills a page of space `pages` after all steps."""
    value = 9
    for step in STEPS:
        if page in pages_of(step):
            value = (page * 7 + step * 31) % 251
    return value


def write_sample(target):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "store"
        with Store.create(path, BUDGET, page_size=PAGE_BYTES) as store:
            pages = store.create_space(
                "pages", dtype="uint8", row_width=PAGE_BYTES, n_rows=N_PAGES, initial=Constant(9)
            )
            store.create_space(
                "features",
                dtype="float16",
                row_width=2,
                n_rows=5000,
                initial=Uniform(-1, 1, seed=3),
            )
            for step in STEPS:
                for part in np.array_split(pages_of(step), 4):
                    with store.claim([(pages, part)], write=True) as claim:
                        values = (part * 7 + step * 31) % 251
                        store.arena[claim.frames[0]] = values[:, None].astype(np.uint8)
                store.commit(attributes={"kind": "sample"}, meta={"step": step})
            store.demote(pages, pages_of(2))
            store.commit()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    content = b"" if file.name == "lock" else file.read_bytes()
                    name = zipfile.ZipInfo(file.relative_to(path).as_posix())
                    archive.writestr(name, content, zipfile.ZIP_DEFLATED)


def assert_is_sample(store):
    assert store.meta["step"] == STEPS[-1]
    assert store.attributes == {"kind": "sample"}
    pages = store.space("pages")
    for page in range(N_PAGES):
        with store.claim([(pages, np.array([page]))]) as claim:
            assert (store.arena[claim.frames[0][0]] == content_of(page)).all()
    features = store.space("features")
    with store.claim([(features, np.array([1]))]) as claim:
        row = store.arena[claim.frames[0][0]].view(np.float16)
    expected = uniform_at(PAGE_BYTES // 2, PAGE_BYTES // 2, Uniform(-1, 1, seed=3))
    assert (row == expected.astype(np.float16)).all()
    store.check()


@pytest.fixture(params=FORMATS_READ)
def sample(request, tmp_path):
    with zipfile.ZipFile(SAMPLES / f"format-{request.param}.zip") as archive:
        archive.extractall(tmp_path / "store")
    return tmp_path / "store"


def test_a_stored_sample_opens_and_reads_right(sample):
    with Store.open(sample, BUDGET, read_only=True) as store:
        assert_is_sample(store)
    with Store.open(sample, BUDGET) as store:
        assert_is_sample(store)
    with Store.open(sample, BUDGET) as store:
        assert_is_sample(store)


def test_a_stored_sample_goes_on_with_all_that_is_new(sample):
    with Store.open(sample, BUDGET) as store:
        pages = store.space("pages")
        store.snapshots.take("as it was")
        with store.claim([(pages, np.arange(40))], write=True) as claim:
            store.arena[claim.frames[0]] = 77
        store.drop_space("features")
        store.create_space("more", dtype="float32", row_width=4, n_rows=1 << 60)
        store.commit(meta={"step": 4})
        store.check()
    with Store.open(sample, BUDGET, read_only=True, snapshot="as it was") as store:
        assert_is_sample(store)
    with Store.open(sample, BUDGET) as store:
        with store.claim([(store.space("pages"), np.arange(40))]) as claim:
            assert (store.arena[claim.frames[0]] == 77).all()
        store.snapshots.roll_back("as it was")
        store.snapshots.drop("as it was")
        assert_is_sample(store)


def test_the_sample_of_format_3_has_cold_pages(tmp_path):
    with zipfile.ZipFile(SAMPLES / "format-3.zip") as archive:
        archive.extractall(tmp_path / "store")
    with Store.open(tmp_path / "store", BUDGET) as store:
        assert store.is_cold(store.space("pages"), pages_of(2)).all()


def test_a_store_of_format_1_has_no_tags_to_salvage_by(tmp_path):
    with zipfile.ZipFile(SAMPLES / "format-1.zip") as archive:
        archive.extractall(tmp_path / "store")
    with pytest.raises(SalvageError, match="format 1"):
        salvage(tmp_path / "store", tmp_path / "salvaged")


def test_a_newer_format_is_refused_and_named(sample, monkeypatch):
    monkeypatch.setattr("tiers.root.FORMATS_READ", ())
    with pytest.raises(FormatVersionError, match=r"format version [123] is unknown"):
        Store.open(sample, BUDGET)


def test_every_format_that_is_read_has_a_sample():
    assert {FORMAT_VERSION, FORMAT_VERSION_COLD} <= set(FORMATS_READ)
    assert all((SAMPLES / f"format-{number}.zip").is_file() for number in FORMATS_READ)


if __name__ == "__main__":
    write_sample(sys.argv[1])
