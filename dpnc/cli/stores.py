"""The commands on stores, whatever is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpnc.cli.app import (
    EXIT_NOT_INTACT,
    STORES,
    Budget,
    Json,
    StorePath,
    app,
    complain,
    errors,
    guarded,
    telling,
)
from dpnc.cli.printing import (
    describe_field,
    describe_store,
    mib,
    print_description,
    print_json,
    print_salvage,
    print_scrub,
    print_snapshots,
    snapshots_of,
)

BUDGET_DEFAULT = "64MiB"
Target = Annotated[Path, typer.Argument(help="Directory to make; its parent exists.")]
SnapshotName = Annotated[str, typer.Argument(help="Name of the snapshot.")]

snapshot = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="List, take and drop snapshots of a store, and go back to one.",
    epilog="Example: [bold]dpnc snapshot take photo.dpnc before[/bold]",
)
app.add_typer(snapshot, name="snapshot", rich_help_panel=STORES)


@app.command(
    rich_help_panel=STORES,
    epilog="""Examples:

[bold]dpnc info photo.dpnc[/bold]

[bold]dpnc info photo.dpnc --json[/bold]   everything, for programs""",
)
def info(store: StorePath, budget: Budget = "16MiB", json_only: Json = False) -> None:
    """Say what STORE holds: field, spaces, snapshots, sizes, last commit.

    Somebody else may have it open and write it meanwhile.
    """
    with guarded():
        from dpnc import Field
        from dpnc.errors import FieldFormatError
        from tiers import Store

        with Store.open(store, budget, read_only=True) as opened:
            document = describe_store(store, opened)
            if "field" in opened.attributes:
                try:
                    with Field(opened) as field:
                        document |= describe_field(field)
                except FieldFormatError as refused:
                    document["field_error"] = str(refused)
    if json_only:
        print_json(document)
    else:
        print_description(document)


@app.command(
    rich_help_panel=STORES,
    epilog="""Example: [bold]dpnc check photo.dpnc && echo sound[/bold]

It ends with the first thing that is wrong; [bold]dpnc scrub[/bold] lists every damaged block.""",
)
def check(store: StorePath, budget: Budget = BUDGET_DEFAULT, json_only: Json = False) -> None:
    """Recount every invariant of STORE, and read back every block and page of it.

    Somebody else may have it open and write it meanwhile. Exit code 3 if something is wrong.
    """
    with guarded():
        from tiers import Store

        with Store.open(store, budget, read_only=True) as opened:
            errors.print("reading everything back")
            try:
                counted = opened.check()
            except AssertionError as wrong:
                complain("the store's books do not add up", wrong)
                raise typer.Exit(EXIT_NOT_INTACT) from None
            document = {"store": str(store), "commit": opened.commit_number, **counted}
    if json_only:
        print_json(document)
        return
    typer.echo(
        f"{store} is sound at commit {document['commit']}: {counted['pages']:,} pages, "
        f"{counted['nodes']:,} map nodes, {counted['snapshots']} snapshot(s)"
    )
    if counted["blocks_lost"]:
        typer.echo(f"{counted['blocks_lost']:,} blocks are lost; dpnc compact reclaims them")
    if counted["damaged_root_copies"]:
        typer.echo(f"{counted['damaged_root_copies']} copies of the root are damaged")


@app.command(
    rich_help_panel=STORES,
    epilog="""Examples:

[bold]dpnc scrub photo.dpnc[/bold]

[bold]dpnc scrub photo.dpnc --json | jq .damaged[/bold]   every damaged block, for programs""",
)
def scrub(store: StorePath, json_only: Json = False) -> None:
    """Read back every block of STORE and of its snapshots, and list what is damaged.

    Somebody else may have it open and write it meanwhile. Nothing is changed; it takes about 1 MiB
    of memory. Exit code 3 if something is damaged.
    """
    with guarded(), telling("reading blocks") as tell:
        from tiers.scrub import scrub as scrub_store

        report = scrub_store(store, progress=tell)
    document = {"store": str(store), **report.to_dict()}
    if json_only:
        print_json(document)
    else:
        print_scrub(document)
    if report.damaged:
        raise typer.Exit(EXIT_NOT_INTACT)


@app.command(
    rich_help_panel=STORES,
    epilog="Example: [bold]dpnc compact photo.dpnc[/bold]   after spaces or snapshots were dropped",
)
def compact(store: StorePath, budget: Budget = BUDGET_DEFAULT, json_only: Json = False) -> None:
    """Move the pages of STORE together and cut its file to what it needs.

    It makes commits of bounded size: interrupt it when you like, and go on later. Nobody else may
    write meanwhile.
    """
    with guarded(), telling("moving blocks") as tell:
        from tiers import Store

        with Store.open(store, budget) as opened:
            report = opened.compact(progress=tell)
    document = {"store": str(store), **report.to_dict()}
    if json_only:
        print_json(document)
        return
    typer.echo(
        f"{store}: {mib(report.file_bytes_before)} before, {mib(report.file_bytes)} now, "
        f"{mib(report.used_bytes)} of them in use"
    )
    if report.pages_repacked or report.packs_removed:
        typer.echo(
            f"cold tier: {report.pages_repacked:,} pages packed anew, "
            f"{report.packs_removed:,} dead packs removed"
        )
    if report.is_cramped:
        typer.echo("there was no room to move more; once readers have ended, another run may help")


@app.command(
    rich_help_panel=STORES,
    epilog="""Examples:

[bold]dpnc backup photo.dpnc /mnt/photo.dpnc[/bold]

[bold]dpnc backup photo.dpnc before.dpnc --snapshot before[/bold]   as it was then""",
)
def backup(
    store: StorePath,
    target: Target,
    of_snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", help="Copy this snapshot; the last commit if left out."),
    ] = None,
    budget: Budget = BUDGET_DEFAULT,
    json_only: Json = False,
) -> None:
    """Write one state of STORE as a new store at TARGET; every page is verified.

    Somebody else may have STORE open and write it meanwhile. Nothing at TARGET opens before all of
    it is there. Snapshots are not copied.
    """
    with guarded(), telling("copying pages") as tell:
        from tiers.backup import backup as back_up

        n_pages = back_up(store, target, snapshot=of_snapshot, budget=budget, progress=tell)
    document = {
        "store": str(store),
        "target": str(target),
        "snapshot": of_snapshot,
        "pages": n_pages,
    }
    if json_only:
        print_json(document)
    else:
        typer.echo(f"{target}: {n_pages:,} pages")


@app.command(
    rich_help_panel=STORES,
    epilog="Example: [bold]dpnc salvage broken.dpnc found.dpnc[/bold]   when check says corrupt",
)
def salvage(
    store: StorePath, target: Target, budget: Budget = BUDGET_DEFAULT, json_only: Json = False
) -> None:
    """Write what can be found of the damaged STORE as a new store at TARGET.

    Pages are found by their tags where the map is damaged; every page is verified, and STORE is not
    changed. Pages that were discarded may come back; snapshots are gone. Exit code 3 if something
    was lost.
    """
    with guarded(), telling("reading pages") as tell:
        from tiers.salvage import salvage as salvage_store

        report = salvage_store(store, target, budget=budget, progress=tell)
    document = {"store": str(store), "target": str(target), **report.to_dict()}
    if json_only:
        print_json(document)
    else:
        print_salvage(document)
    if report.damaged or report.lost:
        raise typer.Exit(EXIT_NOT_INTACT)


@app.command(
    rich_help_panel=STORES,
    epilog="""Examples:

[bold]dpnc export photo.dpnc photo.zarr[/bold]

[bold]dpnc export photo.dpnc features.zarr --space features --snapshot before[/bold]

In Python: [bold]zarr.open_group("photo.zarr")["features"][:][/bold]""",
)
def export(
    store: StorePath,
    target: Target,
    space: Annotated[
        str | None, typer.Option(help="Write this space alone; all of them if left out.")
    ] = None,
    of_snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", help="Write this snapshot; the last commit if left out."),
    ] = None,
    materialised_max: Annotated[
        str,
        typer.Option(
            help="Rows that begin with random values are all written, whether the store has them "
            "or not; refuse a space that comes to more than this."
        ),
    ] = "16GiB",
    budget: Budget = BUDGET_DEFAULT,
    json_only: Json = False,
) -> None:
    """Write the spaces of STORE as zarr v3 arrays, which need no dpnc to be read.

    One array a space, (rows, elements of a row), rows in their order, in a group at TARGET.
    Somebody else may have STORE open and write it meanwhile.
    """
    with guarded(), telling("writing pages") as tell:
        from tiers.export import export as export_store

        report = export_store(
            store,
            target,
            space=space,
            snapshot=of_snapshot,
            materialised_max=materialised_max,
            budget=budget,
            progress=tell,
        )
    document = {"store": str(store), "target": str(target), **report.to_dict()}
    if json_only:
        print_json(document)
    else:
        typer.echo(
            f"{target}: {', '.join(report.arrays.values()) or 'no arrays'}; {report.n_chunks:,} "
            f"chunks, {mib(report.size_bytes)}, of commit {report.commit}"
        )


@snapshot.command("list", epilog="Example: [bold]dpnc snapshot list photo.dpnc[/bold]")
def list_snapshots(store: StorePath, budget: Budget = "16MiB", json_only: Json = False) -> None:
    """List the snapshots of STORE, oldest first."""
    with guarded():
        from tiers import Store

        with Store.open(store, budget, read_only=True) as opened:
            snapshots = snapshots_of(opened)
    if json_only:
        print_json({"store": str(store), "snapshots": snapshots})
    else:
        print_snapshots(snapshots)


@snapshot.command(epilog="Example: [bold]dpnc snapshot take photo.dpnc before[/bold]")
def take(
    store: StorePath, name: SnapshotName, budget: Budget = "16MiB", json_only: Json = False
) -> None:
    """Give the last commit of STORE the name NAME, under which it stays readable.

    It costs what later commits would have freed.
    """
    with guarded():
        from tiers import Store

        with Store.open(store, budget) as opened:
            commit = opened.snapshots.take(name)
            document = {"store": str(store), "name": name, "commit": commit}
    _say(document, json_only, f"{name} is commit {commit} of {store}")


@snapshot.command(epilog="Example: [bold]dpnc snapshot drop photo.dpnc before[/bold]")
def drop(
    store: StorePath, name: SnapshotName, budget: Budget = BUDGET_DEFAULT, json_only: Json = False
) -> None:
    """Forget the snapshot NAME of STORE, and free what it alone kept."""
    with guarded():
        from tiers import Store

        with Store.open(store, budget) as opened:
            opened.snapshots.drop(name)
            document = {"store": str(store), "name": name, "snapshots": snapshots_of(opened)}
    _say(document, json_only, f"{name} is dropped from {store}")


@snapshot.command(
    epilog="""Examples:

[bold]dpnc snapshot rollback photo.dpnc before[/bold]

[bold]dpnc backup photo.dpnc today.dpnc[/bold]   first, if what is there now may be wanted again"""
)
def rollback(
    store: StorePath,
    name: SnapshotName,
    drop_newer: Annotated[
        bool, typer.Option("--drop-newer", help="Drop the snapshots that are newer; else refuse.")
    ] = False,
    budget: Budget = BUDGET_DEFAULT,
    json_only: Json = False,
) -> None:
    """Make the snapshot NAME the newest state of STORE again; it stays a snapshot.

    Every commit after it is lost.
    """
    with guarded():
        from tiers import Store

        with Store.open(store, budget) as opened:
            opened.snapshots.roll_back(name, drop_newer=drop_newer)
            document = {
                "store": str(store),
                "name": name,
                "commit": opened.commit_number,
                "snapshots": snapshots_of(opened),
            }
    _say(document, json_only, f"{store} is as it was at {name} again")


def _say(document: dict[str, Any], json_only: bool, line: str) -> None:
    if json_only:
        print_json(document)
    else:
        typer.echo(line)
