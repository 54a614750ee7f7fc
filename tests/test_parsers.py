"""Every parser, given documents that are nearly right and whose checksums are.

Bytes that nobody forged fail their checksum long before they are parsed (`test_corruptions`); here
the checksums are made right again, so that what lies behind them is tried. A store whose bytes were
forged may read as anything that its format can say. It may not break the process, nor take memory
by the length that a document claims.
"""

from __future__ import annotations

import json
import os
import resource
import struct
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import dpnc
from dpnc.cli import app
from dpnc.errors import FieldError
from tests.fields import grid
from tests.forging import Forgery, entry_fields, integers, mutations, sealed_root, values
from tiers import Budget
from tiers.allocator import BLOCK_BYTES, TAG_BYTES
from tiers.budget import parse_size
from tiers.catalogue import Catalogue
from tiers.errors import BudgetError, CorruptionError, TierError
from tiers.page_map import ABSENT_WORD, ALLOCATION, FIRST_SPACE, pack_entry
from tiers.readers import Readers
from tiers.root import ROOT_FILE_BYTES, decode_root_file
from tiers.salvage import salvage
from tiers.slots import SlotFile
from tiers.space import SpaceSpec
from tiers.store import Store
from tiers.tags import Tags
from tiers.testing import FaultDisk
from tiers.testing.model import read_page
from tiers.testing.runs import limit_memory
from tiers.testing.specimen import PAGES_PATH, specimen
from tiers.testing.workload import PATH

MEMORY_BYTES_MAX = 192 << 20
TARGET = PATH.parent / "salvaged"
slow = settings(suppress_health_check=list(HealthCheck))


@lru_cache(maxsize=1)
def made():
    """Return a store of 4 KiB pages that has snapshots and packs."""
    return specimen(6)


def forgery():
    return Forgery(made())


@contextmanager
def bounded_memory():
    """Refuse the block more memory than any small store should ask for."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory(MEMORY_BYTES_MAX)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def look(disk, *, right=None):
    """Open a store in every way and read all of it; whatever is refused has a type."""
    with bounded_memory():
        for options in ({"read_only": True}, {"read_only": True, "snapshot": "first"}, {}):
            twin = disk.twin()
            with (
                suppress(TierError),
                Store.open(PATH, made().budget_bytes, disk=twin, **options) as store,
            ):
                assert store.attributes is not None
                assert store.meta is not None
                read(store, right if "snapshot" not in options else None)
                with suppress(TierError):
                    store.scrub()
                with suppress(TierError, AssertionError):
                    # Bitmaps that were forged do not add up, and a check says so.
                    store.check()
        with suppress(TierError):
            salvage(PATH, TARGET, budget=made().budget_bytes, disk=disk.twin())


def read(store, right):
    for space in store.spaces:
        stored = []
        with suppress(TierError):
            for pages in store.stored_pages(space):
                stored.extend(pages.tolist())
                if len(stored) > 600:
                    break
        others = [0, 1, space.n_pages // 2, space.n_pages - 1]
        for page in sorted({*stored[:20], *others}):
            if page >= space.n_pages:
                continue
            with (
                suppress(TierError),
                store.claim([(space, np.array([page], np.int64))]) as claim,
            ):
                content = store.arena[claim.frames[0][0]].tobytes()
                if right is not None:
                    assert content in right(space.name, page)


# The root


ROOT_FIELDS = [
    (8, "I"), (16, "Q"), (32, "I"), (36, "I"), (40, "Q"), (48, "Q"), (56, "Q"),
    *[(64 + 24 * tree + at, "Q") for tree in range(3) for at in (0, 8)],
    *[(64 + 24 * tree + 16, "I") for tree in range(3)],
    (136, "Q"), (144, "Q"), (152, "Q"), (160, "I"), (164, "I"), (168, "Q"), (176, "Q"), (680, "Q"),
]  # fmt: skip


@slow
@given(st.lists(st.tuples(st.sampled_from(ROOT_FIELDS), integers), min_size=1, max_size=3))
@example([((32, "I"), 0)])
@example([((32, "I"), 1 << 31)])
@example([((64 + 16, "I"), (1 << 32) - 1)])
@example([((88 + 16, "I"), 0)])
@example([((56, "Q"), 1 << 62)])
@example([((136, "Q"), (1 << 64) - 1)])
@example([((144, "Q"), (1 << 64) - 1)])
@example([((40, "Q"), (1 << 64) - 1)])
def test_a_root_that_says_anything_is_read_or_refused(changes):
    forged = forgery()
    size = {"I": 32, "Q": 64}
    forged.put_root(
        {
            offset: struct.pack("<" + code, number % (1 << size[code]))
            for (offset, code), number in changes
        }
    )
    look(forged.disk)


@given(st.binary(max_size=300), st.integers(0, 40), st.booleans())
def test_a_root_file_of_any_bytes_is_read_or_refused(content, n_repeats, has_mark):
    content = content * n_repeats * 4
    if has_mark:
        blocks = [
            content[i : i + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0") for i in range(0, 16384, 4096)
        ]
        content = b"".join(sealed_root(b"dpncroot" + block[8:]) for block in blocks)
    with suppress(TierError):
        decode_root_file(content[:ROOT_FILE_BYTES], "a path")


@slow
@given(st.binary(max_size=36), st.integers(0, 35))
def test_a_header_of_any_bytes_is_refused_or_right(content, start):
    disk = made().disk.twin()
    disk.put(PAGES_PATH, start, content[: 36 - start])
    look(disk, right=lambda name, page: {right_page(name, page)})


def right_page(name, page):
    return read_page(made().newest, name, page, made().page_bytes)


# Map nodes


@slow
@given(st.data())
def test_map_nodes_that_say_anything_are_read_or_refused(data):
    forged = forgery()
    key = data.draw(st.sampled_from([key for key in forged.node_keys() if key[1] > 0]))
    entries = forged.entries(key)
    changes = {}
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(sorted(entries)) | st.integers(0, 255))
        block, version, crc = entry_fields(entries.get(place, (0, 0)))
        block = data.draw(st.just(block) | integers) % (1 << 48)
        version = data.draw(st.just(version) | integers) % (1 << 48)
        crc = data.draw(st.just(crc) | integers) % (1 << 32)
        words = pack_entry(block, version, crc)
        changes[place] = data.draw(
            st.just(words) | st.sampled_from([(0, 0), (ABSENT_WORD, 0), (0, ABSENT_WORD)])
        )
    forged.put_entries(key, changes)
    look(forged.disk)


def check_swapped_entries():
    """Exchange what two leaves, or two pages, are named by; nothing reads as the other one."""
    forged = forgery()
    keys = [key for key in forged.node_keys() if key[1] > 0 and key[0] != ALLOCATION]
    n_swapped = 0
    for key in keys:
        entries = forged.entries(key)
        places = sorted(entries)
        for one, other in list(pairwise(places))[:2]:
            swapped = forgery()
            swapped.put_entries(key, {one: entries[other], other: entries[one]})
            look(swapped.disk, right=lambda name, page: {right_page(name, page)})
            n_swapped += 1
    assert n_swapped > 10
    return n_swapped


def test_leaves_that_are_swapped_are_refused():
    check_swapped_entries()


@slow
@given(st.data())
def test_bitmaps_of_any_bytes_do_not_break_reading(data):
    forged = forgery()
    content = bytearray(forged.content((ALLOCATION, 0, 0)))
    start = data.draw(st.integers(0, BLOCK_BYTES - 1))
    noise = data.draw(st.binary(min_size=1, max_size=64))
    content[start : start + len(noise)] = noise
    forged.put_node((ALLOCATION, 0, 0), bytes(content[:BLOCK_BYTES]))
    look(forged.disk, right=lambda name, page: {right_page(name, page)})


# The catalogue


def catalogue_document():
    document = json.loads(forgery().document())
    document["meta"] = {"text": "x"}
    document["attributes"] = {"field": {"format": 1, "list": [1, 2.5, None]}}
    return document


@slow
@given(st.data())
def test_a_catalogue_that_says_anything_is_read_or_refused(data):
    document = data.draw(mutations(catalogue_document()))
    forged = forgery()
    forged.put_document(json.dumps(document).encode())
    look(forged.disk)


@given(st.data())
def test_a_catalogue_is_decoded_to_what_it_encodes_or_refused(data):
    document = data.draw(mutations(catalogue_document()))
    content = json.dumps(document).encode()
    try:
        found = Catalogue.decode(content)
    except CorruptionError:
        return
    assert Catalogue.decode(found.encode()) == found


@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"spaces":{},"next_space":1e999,"attributes":{},"meta":{}}')
@example(b'{"spaces":{},"next_space":0,"attributes":{"a":NaN},"meta":{}}')
@example(
    b'{"spaces":{},"next_space":0,"attributes":{"a":' + b"[" * 300 + b"]" * 300 + b'},"meta":{}}'
)
def test_a_catalogue_of_any_bytes_is_refused(content):
    with bounded_memory(), pytest.raises(CorruptionError):
        Catalogue.decode(content)


@given(st.data())
def test_a_space_that_is_described_wrongly_is_refused(data):
    document = catalogue_document()["spaces"]
    spec = data.draw(st.sampled_from(sorted(document)))
    mutated = data.draw(mutations(document[spec]))
    with suppress(TierError, KeyError, TypeError, AttributeError, ValueError):
        # What is no description at all is the catalogue's to refuse.
        assert SpaceSpec.from_dict(mutated).row_bytes > 0


# Tags


@slow
@given(st.data())
def test_tags_that_say_anything_are_salvaged_or_passed_over(data):
    """The leaves of one space are damaged, so that a salvage asks the tags."""
    forged = forgery()
    for key in forged.node_keys():
        if key[0] == FIRST_SPACE and key[1] == 1:
            forged.disk.put(PAGES_PATH, forged.nodes[key].block * BLOCK_BYTES, bytes(BLOCK_BYTES))
    file = forged.disk.open(PAGES_PATH, "read", direct=True)
    slots = SlotFile(forged.disk, file, made().page_bytes, None)
    tags = Tags(slots, forged.root.store_id)
    for _ in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.sampled_from(made().parts["tags"]))
        first = made().page_bytes
        slot = (part.offset - first) // TAG_BYTES
        fields = [
            data.draw(integers) % (1 << 32),
            data.draw(integers) % (1 << 64),
            data.draw(st.just(forged.root.version) | integers) % (1 << 64),
            data.draw(integers) % (1 << 32),
        ]
        forged.disk.put(PAGES_PATH, part.offset, forged_tag(tags, slot, fields))
    with bounded_memory(), suppress(TierError):
        salvage(PATH, TARGET, budget=made().budget_bytes, disk=forged.disk)


def forged_tag(tags, slot, fields):
    import google_crc32c

    rest = struct.pack("<IQQII", *fields, 0)
    return struct.pack("<I", google_crc32c.value(rest + tags._identity(slot))) + rest


# Names of readers


@given(
    st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=80
    )
)
@example("²-reader")
@example("٣-reader")
@example("-1-reader")
@example("9" * 80)
@example("new-")
def test_files_of_readers_may_have_any_name(name):
    disk = made().disk.twin()
    if name in (".", ".."):
        return
    with suppress(FileExistsError):
        disk.make_directory(PATH / "readers")
    disk.close(disk.open(PATH / "readers" / name, "create", direct=False))
    other = disk.process()
    held = other.lock(PATH / "readers" / name, exclusive=True, signed=False)
    readers = Readers(disk, PATH, 1)
    assert isinstance(readers.oldest(), int | None)
    other.close(held)
    with Store.open(PATH, made().budget_bytes, disk=disk) as store:
        assert store.commit_number == made().commit


# Budgets


@given(
    st.text(max_size=30)
    | values
    | st.builds(
        lambda digits, times, unit: digits * times + unit,
        st.sampled_from(["9", "1", "0.", "٣", "1.5"]),
        st.sampled_from([1, 2, 20, 400, 5000]),
        st.sampled_from(["", " ", "b", "KiB", "PiB", "PB", "apples"]),
    )
)
@example("9" * 400 + "PiB")
def test_a_budget_is_a_size_or_refused(budget):
    for call in (
        parse_size,
        Budget.of,
        lambda size: Budget(1, cxl=size),
        lambda size: Budget(1, nvme=size),
    ):
        with suppress(BudgetError):
            call(budget)


@given(st.integers(20, 200), st.booleans())
@example(62, True)
@example(47, True)
def test_a_budget_beyond_the_memory_of_the_machine_is_refused_or_costs_nothing(bits, as_dram):
    if as_dram and bits < 46:
        return  # the system may well give it, page by page as it is used
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    size = 1 << bits
    budget = (
        Budget(size) if as_dram else Budget(1 << 20, cxl=size if bits >= 46 else None, nvme=size)
    )
    with suppress(TierError), Store.create(PATH, budget, page_size=4096, disk=disk):
        pass


# Fields


FIELD_BUDGET = 4 << 20


@lru_cache(maxsize=1)
def field_disk():
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    dpnc.create(
        PATH,
        grid(),
        budget=FIELD_BUDGET,
        optimizer=dpnc.Adam(),
        head=dpnc.Head(n_outputs=2, n_hidden=4),
        disk=disk,
    ).close()
    with Store.open(PATH, FIELD_BUDGET, disk=disk) as store:
        return disk, store.attributes


@slow
@given(st.data())
def test_a_field_that_says_anything_of_itself_is_read_or_refused(data):
    disk, attributes = field_disk()
    disk = disk.twin()
    record = data.draw(mutations(attributes))
    with Store.open(PATH, FIELD_BUDGET, disk=disk) as store:
        try:
            store.commit(attributes=record)
        except TierError:
            return
    open_and_use(disk)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", [{"kind": "adam"}]),
        ("optimizer", "adam"),
        ("head", ["n_outputs", "n_hidden", "output_activation"]),
        ("encoding", []),
    ],
)
def test_a_field_whose_record_is_of_another_kind_is_refused(name, value):
    disk, attributes = field_disk()
    disk = disk.twin()
    with Store.open(PATH, FIELD_BUDGET, disk=disk) as store:
        store.commit(attributes={"field": {**attributes["field"], name: value}})
    with pytest.raises(dpnc.errors.FieldFormatError, match="unreadable"):
        dpnc.open(PATH, budget=FIELD_BUDGET, disk=disk)


def open_and_use(disk):
    with (
        bounded_memory(),
        suppress(TierError),
        dpnc.open(PATH, budget=FIELD_BUDGET, disk=disk) as field,
    ):
        x = np.random.default_rng(0).random((8, field.encoding.n_dims))
        with suppress(FieldError, TierError):
            field.query(x)
        with suppress(FieldError, TierError):
            field.decode(x)
        with suppress(FieldError, TierError):
            field.update(x, np.ones((8, field.encoding.n_output_dims), np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log2_hashmap_size", 24),
        ("log2_hashmap_size", 6),
        ("n_features_per_level", 8),
        ("n_dims", 3),
        ("grid_type", "dense"),
        ("brick_edge", 2),
    ],
)
def test_a_field_that_is_of_another_size_than_its_space_reads_no_other_memory(name, value):
    disk, attributes = field_disk()
    disk = disk.twin()
    encoding = {**attributes["field"]["encoding"], name: value}
    with Store.open(PATH, FIELD_BUDGET, disk=disk) as store:
        store.commit(attributes={"field": {**attributes["field"], "encoding": encoding}})
    open_and_use(disk)


# The command line


WORDS = [
    "info", "check", "scrub", "compact", "backup", "salvage", "export", "demo", "image", "fit",
    "--json", "--help", "--budget", "--seed", "--snapshot", "--space", "--progress", "-",
    "64MiB", "1 apple", "9" * 400 + "PiB", "-1", "0", "1e999", "nan", "²", "", "first",
    "STORE", "NOTHING", "FILE", "TARGET",
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tmp_path_factory.mktemp("parsers")
    # A word may become the path of something that is made.
    before = Path.cwd()
    os.chdir(base)
    Store.create(base / "store", "1MiB", page_size=4096).close()
    (base / "file").write_bytes(b"dpncroot" * 10)
    yield {
        "STORE": base / "store",
        "NOTHING": base / "nothing" / "there",
        "FILE": base / "file",
        "TARGET": base / "target",
    }
    os.chdir(before)


@slow
@given(words=st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=6))
def test_a_command_line_of_any_words_ends_with_a_message(places, words):
    if {"demo", "image", "fit"} & set(words[:1]) and "--help" not in words:
        words = [*words, "--help"]
    arguments = [str(places.get(word, word)) for word in words]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit | TierError)
