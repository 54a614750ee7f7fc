"""What is printed: documents of JSON values, for programs and for people."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.table import Table

    from dpnc import Field
    from tiers import Store

MIB = 1 << 20
DAMAGED_SHOWN = 20
PAGES_SHOWN = 10
VOLATILE = ("dram", "cxl")


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    import msgspec

    typer.echo(json.dumps(msgspec.to_builtins(document), indent=2, allow_nan=False))


def describe_store(path: Path, store: Store) -> dict[str, Any]:
    """Return what a store holds, as JSON values."""
    return {
        "store": str(path),
        "commit": store.commit_number,
        "page_bytes": store.page_bytes,
        "spaces": [
            {
                **space.spec.to_dict(),
                "pages": space.n_pages,
                "pages_stored": store.n_stored_pages(space),
                "pages_allocated": store.n_allocated(space),
            }
            for space in store.spaces
        ],
        "snapshots": snapshots_of(store),
        "meta": store.meta,
        "stats": store.stats(),
    }


def snapshots_of(store: Store) -> list[dict[str, Any]]:
    """Return the snapshots of a store, oldest first, as JSON values."""
    return [{"name": name, "commit": commit} for name, commit in store.snapshots.items()]


def describe_field(field: Field) -> dict[str, Any]:
    """Return what a field is, as JSON values; its stats hold those of its store."""
    encoding = field.encoding
    return {
        "encoding": encoding.to_dict(),
        "levels": [
            {"resolution": level.resolution, "rows": level.rows, "kind": level.kind}
            for level in encoding.levels
        ],
        "n_params": encoding.n_params,
        "dtype": field.dtype,
        "head": None if field.head is None else field.head.to_dict(),
        "optimizer": None if field.optimizer is None else field.optimizer.to_dict(),
        "updates": field.updates,
        "stats": field.stats(),
    }


def print_description(document: dict[str, Any]) -> None:
    """Print what `describe_store` and `describe_field` returned, for people to read."""
    if "encoding" in document:
        encoding = document["encoding"]
        line = (
            f"{document['store']}: {encoding['n_dims']}-D hash grid, layout {encoding['layout']}, "
            f"{document['n_params']:,} parameters of {document['dtype']}, "
            f"{document['updates']} updates"
        )
    else:
        line = f"{document['store']}: a store without a field"
    _say(line)
    if "field_error" in document:
        _say(f"its field cannot be read: {document['field_error']}")
    _say(f"commit {document['commit']}, pages of {document['page_bytes'] // 1024} KiB")
    # Tables of rows are not what one looks for here.
    plain = [
        f"{name} {value}" for name, value in document["meta"].items() if not isinstance(value, dict)
    ]
    if plain:
        _say(f"meta: {', '.join(plain)}")
    console = Console()
    page_bytes = document["page_bytes"]
    console.print(
        _table(
            ("space", "rows", "row", "unwritten", "pages", "stored"),
            (
                (
                    space["name"],
                    f"{space['n_rows']:,}",
                    f"{space['row_width']} x {space['dtype']}",
                    _initial(space["initial"]),
                    f"{space['pages_stored']:,}",
                    mib(space["pages_stored"] * page_bytes),
                )
                for space in document["spaces"]
            ),
        )
    )
    if "levels" in document:
        levels = enumerate(document["levels"])
        console.print(
            _table(
                ("level", "resolution", "rows", "kind"),
                (
                    (str(i), f"{level['resolution']:,}", f"{level['rows']:,}", level["kind"])
                    for i, level in levels
                ),
            )
        )
    print_snapshots(document["snapshots"])
    console.print(
        _table(
            ("tier", "in use", "on disk"),
            (
                # Packs are compressed, and not looked at one by one to add up what they take.
                (name, mib(tier["used_bytes"]), mib(tier.get("file_bytes")))
                for name, tier in document["stats"]["tiers"].items()
                # What is in memory is in the memory of this command.
                if tier is not None and name not in VOLATILE and tier["used_bytes"]
            ),
        )
    )


def print_snapshots(snapshots: list[dict[str, Any]]) -> None:
    """Print what `snapshots_of` returned."""
    if not snapshots:
        _say("no snapshots")
        return
    rows = ((one["name"], str(one["commit"])) for one in snapshots)
    Console().print(_table(("snapshot", "commit"), rows))


def print_scrub(document: dict[str, Any]) -> None:
    """Print what a scrub found."""
    _say(
        f"{document['store']}: read {document['n_pages']:,} pages and {document['n_nodes']:,} "
        f"blocks of the map, {mib(document['bytes_read'])}, "
        f"of commit {document['commit']} and its {document['n_snapshots']} snapshot(s)"
    )
    if document["damaged_root_copies"]:
        n_copies = len(document["damaged_root_copies"])
        _say(f"{n_copies} copies of the root are damaged; the next writer mends them")
    damaged = document["damaged"]
    if not damaged:
        _say("everything is what was written")
        return
    rows = (
        (
            "last commit" if one["snapshot"] is None else one["snapshot"],
            one["tree"],
            _what_is_damaged(one),
            one["reason"],
        )
        for one in damaged[:DAMAGED_SHOWN]
    )
    Console().print(_table(("state", "where", "damaged", "reason"), rows))
    if len(damaged) > DAMAGED_SHOWN:
        _say(f"and {len(damaged) - DAMAGED_SHOWN} more; --json names all of them")


def print_salvage(document: dict[str, Any]) -> None:
    """Print what a salvage found."""
    _say(
        f"{document['target']}: {document['n_pages']:,} pages of commit {document['commit']}, "
        f"{document['n_by_tag']:,} of them found by their tags"
    )
    for space, pages in document["damaged"].items():
        shown = ", ".join(map(str, pages[:PAGES_SHOWN]))
        more = f" and {len(pages) - PAGES_SHOWN:,} more" if len(pages) > PAGES_SHOWN else ""
        _say(f"lost of {space!r}: {len(pages):,} pages ({shown}{more})")
    if document["lost"]:
        _say(f"lost: {', '.join(document['lost'])}")


def print_lookups(document: dict[str, Any]) -> None:
    """Print what `dpnc bench lookup` found."""
    header = (
        "rows a level",
        "field",
        "points/s",
        "rows/s",
        "random lines/s",
        "in order",
        "rows a line",
    )
    rows = []
    for size in document["sizes"]:
        points = size["points_per_s"]
        rows.append(
            (
                f"2^{size['log2_rows_per_level']}",
                mib(size["field_bytes"]),
                f"{points / 1e6:.2f} M",
                f"{size['rows_per_line'] * size['lines_per_s'] / 1e6:,.0f} M",
                f"{size['lines_per_s'] / 1e6:,.0f} M",
                f"{size['stream_bytes_per_s'] / 1e9:.1f} GB/s",
                f"{size['rows_per_line']:.2f}",
            )
        )
    _say(f"{document['dtype']}, {document['threads']} thread(s), everything in memory")
    Console().print(_table(header, tuple(rows)))


def _what_is_damaged(damage: dict[str, Any]) -> str:
    first, stop = damage["first_page"], damage["stop_page"]
    if stop - first == 1 and damage["level"] == 0:
        return f"page {first:,}"
    if stop > first:
        return f"map above pages {first:,} to {stop - 1:,}"
    return f"level {damage['level']}, index {damage['index']}"


def _initial(initial: dict[str, Any]) -> str:
    if initial["kind"] == "constant":
        return f"{initial['value']:g}"
    return f"{initial['low']:g} to {initial['high']:g}"


def mib(size_bytes: int | None) -> str:
    """Return a size in MiB, to be read by people; a dash for one that is not known."""
    return "-" if size_bytes is None else f"{size_bytes / MIB:,.1f} MiB"


def _say(line: str) -> None:
    """Print a line as it is; brackets in it are no markup."""
    Console().print(Text(line), highlight=False, soft_wrap=True)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
