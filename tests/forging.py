"""Stores whose bytes are changed and whose checksums are right all the same."""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
from hypothesis import strategies as st

from tiers.allocator import BLOCK_BYTES
from tiers.checksum import bound_crc32c
from tiers.page_map import (
    ALLOCATION,
    CATALOGUE,
    FANOUT,
    FANOUT_BITS,
    FIRST_SPACE,
    SPACES,
    pack_entry,
    unpack_entry,
)
from tiers.root import ROOT_FILE_BYTES, decode_root_file
from tiers.testing.specimen import PAGES_PATH, ROOT_PATH, Specimen, reached
from tiers.testing.workload import PATH

TOP_OFFSETS = {ALLOCATION: 64, SPACES: 88, CATALOGUE: 112}
CATALOGUE_BYTES_OFFSET = 56
CRC_OFFSET = 12


class Forgery:
    """A copy of a specimen, to be changed behind its checksums."""

    def __init__(self, made: Specimen) -> None:
        self.made = made
        self.disk = made.disk.twin()
        self.root = decode_root_file(made.files[ROOT_PATH], str(PATH))
        self.root_block = self.root.found_as
        self.nodes = {}
        for _, placed in reached(made.disk, self.root):
            key = (placed.tree, placed.level, placed.index)
            # States that share a block name it once; of a key the newest state comes first.
            self.nodes.setdefault(key, placed)
        self.contents = {}

    def node_keys(self):
        return sorted(key for key, placed in self.nodes.items() if not placed.is_page)

    def content(self, key):
        placed = self.nodes[key]
        first = placed.block * BLOCK_BYTES
        return self.contents.get(key, self.made.files[PAGES_PATH][first : first + BLOCK_BYTES])

    def put_node(self, key, content):
        """Put other bytes into a node, with a right checksum in what names it, up to the root."""
        tree, level, index = key
        placed = self.nodes[key]
        self.contents[key] = content
        self.disk.put(PAGES_PATH, placed.block * BLOCK_BYTES, content)
        crc = bound_crc32c(
            np.frombuffer(content, np.uint8), self.root.store_id, *key, placed.version
        )
        entry = struct.pack("<QQ", *pack_entry(placed.block, placed.version, crc))
        if tree in TOP_OFFSETS and (tree, level + 1, index >> FANOUT_BITS) not in self.nodes:
            self.put_root({TOP_OFFSETS[tree]: entry})
            return
        parent, place = (tree, level + 1, index >> FANOUT_BITS), index
        if parent not in self.nodes:
            parent, place = (SPACES, 1, (tree - FIRST_SPACE) >> FANOUT_BITS), tree - FIRST_SPACE
        above = bytearray(self.content(parent))
        at = (place & (FANOUT - 1)) * 16
        above[at : at + 16] = entry
        self.put_node(parent, bytes(above))

    def put_root(self, changes):
        """Put bytes at offsets of the root, into all four copies of it."""
        block = bytearray(self.root_block)
        for offset, content in changes.items():
            block[offset : offset + len(content)] = content
        self.root_block = sealed_root(bytes(block))
        self.disk.put(ROOT_PATH, 0, self.root_block * (ROOT_FILE_BYTES // BLOCK_BYTES))

    def document(self):
        n_pieces = -(-self.root.catalogue_bytes // BLOCK_BYTES)
        content = b"".join(self.content((CATALOGUE, 0, piece)) for piece in range(n_pieces))
        return content[: self.root.catalogue_bytes]

    def put_document(self, content):
        """Put another catalogue in the place of the one that is there, cut to its pieces."""
        n_pieces = -(-self.root.catalogue_bytes // BLOCK_BYTES)
        content = content[: n_pieces * BLOCK_BYTES]
        padded = content.ljust(n_pieces * BLOCK_BYTES, b"\0")
        for piece in range(n_pieces):
            part = padded[piece * BLOCK_BYTES : (piece + 1) * BLOCK_BYTES]
            self.put_node((CATALOGUE, 0, piece), part)
        self.put_root({CATALOGUE_BYTES_OFFSET: struct.pack("<Q", len(content))})

    def entries(self, key):
        """Return the places of a node that are not absent, and what is there."""
        words = np.frombuffer(self.content(key), np.uint64).reshape(FANOUT, 2)
        return {
            place: (int(words[place, 0]), int(words[place, 1]))
            for place in range(FANOUT)
            if int(words[place, 0]) != (1 << 64) - 1
        }

    def put_entries(self, key, entries):
        content = bytearray(self.content(key))
        for place, words in entries.items():
            content[place * 16 : place * 16 + 16] = struct.pack("<QQ", *words)
        self.put_node(key, bytes(content))


def sealed_root(block):
    """Return 4 KiB of a root with a right checksum."""
    blank = block[:CRC_OFFSET] + bytes(4) + block[CRC_OFFSET + 4 :]
    return (
        block[:CRC_OFFSET] + struct.pack("<I", google_crc32c.value(blank)) + block[CRC_OFFSET + 4 :]
    )


def entry_fields(words):
    return unpack_entry(*words)


# Documents

integers = st.integers(-3, 40) | st.sampled_from(
    [sign * (1 << bits) + more for bits in (31, 32, 63, 64, 80, 1400) for sign in (1, -1)
     for more in (-1, 0, 1)]
)  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | integers
    | st.floats()
    | st.sampled_from([1e400, -1e400, 1e308, 5e-324, 0.5])
    | st.text(max_size=12)
    | st.sampled_from(["float32", "float16", "uint8", "constant", "uniform", "adam", "tcnn/1", ""])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def paths_of(document, path=()):
    """Return the path of every value in a document, the whole document left out."""
    children = ()
    if isinstance(document, dict):
        children = document.items()
    elif isinstance(document, list):
        children = enumerate(document)
    found = []
    for key, child in children:
        found.append((*path, key))
        found.extend(paths_of(child, (*path, key)))
    return found


def value_at(document, path):
    for key in path:
        document = document[key]
    return document


@st.composite
def mutations(draw, document):
    """Return a document with one to three things in it other than they were; plain JSON."""
    import copy

    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        paths = paths_of(document)
        if not paths:
            return document
        path = draw(st.sampled_from(paths))
        holder, key = value_at(document, path[:-1]), path[-1]
        way = draw(st.sampled_from(["replace", "replace", "delete", "copy", "rename", "nest"]))
        if way == "delete":
            del holder[key]
        elif way == "copy":
            holder[key] = copy.deepcopy(value_at(document, draw(st.sampled_from(paths))))
        elif way == "rename" and isinstance(holder, dict):
            name = draw(st.text(max_size=4) | integers.map(str))
            holder[name] = holder.pop(key)
        elif way == "nest":
            for _ in range(draw(st.sampled_from([1, 70, 400]))):
                holder[key] = [holder[key]]
        else:
            holder[key] = draw(values)
    return document
