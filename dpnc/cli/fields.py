"""The commands on fields."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dpnc.cli.app import (
    EXIT_INTERRUPTED,
    EXIT_NOT_INTACT,
    FIELDS,
    Budget,
    Json,
    StorePath,
    Threads,
    app,
    errors,
    guarded,
    progress_bar,
)
from dpnc.cli.printing import print_json

if TYPE_CHECKING:
    from dpnc.fitting import ImageFit


class LayoutName(StrEnum):
    """Order of a level's rows."""

    brick = "brick"
    tcnn = "tcnn"


class RowType(StrEnum):
    """Type of the rows' numbers."""

    float16 = "float16"
    float32 = "float32"


@app.command(
    rich_help_panel=FIELDS,
    epilog="""Examples:

[bold]dpnc demo[/bold]   a photograph, a few minutes

[bold]dpnc demo --image holiday.jpg --out report[/bold]   your own picture

[bold]dpnc demo --steps 20[/bold]   a quick look; the picture will be rough""",
)
def demo(
    image: Annotated[
        Path | None,
        typer.Option(help="Picture to fit; a photograph from scikit-image if left out."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where report.json and demo.png go.")] = Path(
        "dpnc-demo"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the fit; fewer are quicker and rougher.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with other sizes, like configs/demo.toml.")
    ] = None,
    json_only: Json = False,
) -> None:
    """Fit a picture on disk, kill a process that updates it, and show that nothing was lost.

    Field and optimiser state take several times the memory they are given.

    The result is compared, bit for bit, with a run in which everything fits memory.
    """
    with guarded(), progress_bar() as progress:
        from dpnc.demo import Plan, report_tables, run_demo

        plan = Plan.of(image=image, steps=steps, config=config)
        plan.require_drawable()
        report = run_demo(plan, out, progress)
    if json_only:
        print_json(report)
    else:
        Console().print(report_tables(report))
    if not report.holds:
        errors.print("[red]a promise does not hold[/red]; see the lines marked NO")
        raise typer.Exit(EXIT_NOT_INTACT)


@app.command(
    rich_help_panel=FIELDS,
    epilog="""Examples:

[bold]dpnc fit photo.jpg photo.dpnc --steps 500[/bold]   fit a picture through 16 MiB

[bold]dpnc fit photo.jpg photo.dpnc --resume --steps 1000[/bold]   go on, up to step 1000

Ctrl-C finishes the step and commits; a second Ctrl-C goes back to the last commit at once.""",
)
def fit(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(help="PNG or JPEG.")],
    store: StorePath,
    budget: Budget = "16MiB",
    steps: Annotated[int, typer.Option(min=0, help="Steps in all, resumed ones included.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the store's last commit.")
    ] = False,
    commit_every: Annotated[int, typer.Option(min=1, help="Steps between commits.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order of tiles.")] = 0,
    layout: Annotated[LayoutName, typer.Option(help="Order of rows.")] = LayoutName.brick,
    dtype: Annotated[RowType, typer.Option(help="Type of rows.")] = RowType.float16,
    levels: Annotated[
        int | None, typer.Option(min=1, help="Levels; as many as the picture has detail for.")
    ] = None,
    features: Annotated[int, typer.Option(min=1, help="Features of a row.")] = 4,
    log2_hashmap_size: Annotated[int, typer.Option(min=1, help="Most rows of a level, log2.")] = 19,
    learning_rate: Annotated[float, typer.Option(help="Step size of Adam.")] = 1e-2,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the head's hidden layer.")] = 32,
    tile: Annotated[int, typer.Option(min=1, help="Edge of a tile in pixels.")] = 32,
    tiles_per_step: Annotated[int, typer.Option(min=1, help="Tiles of a step.")] = 16,
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Fit IMAGE with a field that lives in STORE, through a DRAM budget.

    A fit that was stopped and resumed gives the same bits as one that was not.
    """
    if resume:
        refuse_fixed_options(context)
    with guarded():
        import dpnc
        from dpnc import fitting
        from dpnc.image import load

        pixels = load(image)
        if resume:
            field = dpnc.open(store, budget=budget, threads=threads)
        else:
            height, width, _ = pixels.shape
            schedule = fitting.Schedule(seed, tile, tiles_per_step)
            encoding = dpnc.HashGrid(
                n_dims=2,
                n_levels=levels or fitting.n_levels_for(height, width),
                n_features_per_level=features,
                log2_hashmap_size=log2_hashmap_size,
                base_resolution=fitting.BASE_RESOLUTION,
                per_level_scale=fitting.PER_LEVEL_SCALE,
                layout=layout.value,
            )
            field = dpnc.create(
                store,
                encoding,
                dtype=dtype.value,
                budget=budget,
                optimizer=dpnc.Adam(learning_rate),
                head=dpnc.Head(n_outputs=3, n_hidden=hidden, output_activation="sigmoid"),
                seed=seed,
                threads=threads,
            )
        with field:
            if resume:
                image_fit = fitting.ImageFit.resume(field, pixels)
            else:
                image_fit = fitting.ImageFit.start(field, pixels, schedule)
                image_fit.commit()
            stopped, loss = run_fit(image_fit, steps, commit_every)
            result = {
                "store": str(store),
                "step": image_fit.step_count,
                "loss": loss,
                "interrupted": stopped,
                "digest": field.digest(),
                "stats": field.stats(),
            }
    if json_only:
        print_json(result)
    else:
        typer.echo(f"{store} is committed at step {result['step']}, digest {result['digest']}")
    if stopped:
        again = ["dpnc", "fit", "--resume", str(image), str(store), "--steps", str(steps)]
        again += ["--budget", budget, "--commit-every", str(commit_every)]
        again += [] if threads is None else ["--threads", str(threads)]
        errors.print(f"to go on: {shlex.join(again)}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command(
    rich_help_panel=FIELDS,
    epilog="""Examples:

[bold]dpnc render photo.dpnc whole.png[/bold]   as large as the picture that was fitted

[bold]dpnc render photo.dpnc eye.png --region .4,.4,.6,.6 --width 800[/bold]   a part, enlarged""",
)
def render(
    store: StorePath,
    picture: Annotated[Path, typer.Argument(metavar="OUT.png", help="Picture to write.")],
    region: Annotated[
        str, typer.Option(help="x0,y0,x1,y1 as fractions of the picture, left and top first.")
    ] = "0,0,1,1",
    width: Annotated[int | None, typer.Option(min=1, help="Pixels across.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels down.")] = None,
    budget: Budget = "16MiB",
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Draw a region of the picture in STORE; only the pages it needs are read."""
    corners = parse_region(region)
    with guarded():
        import numpy as np

        import dpnc
        from dpnc import fitting
        from dpnc.image import render_blocks, save_bytes, to_bytes

        with dpnc.open(store, budget=budget, read_only=True, threads=threads) as field:
            fitted = fitting.progress_of(field.meta)
            width, height = output_size(corners, fitted.width, fitted.height, width, height)
            pixels = np.empty((height, width, 3), dtype=np.uint8)
            with progress_bar() as progress:
                task = progress.add_task("drawing", total=width * height)
                for rows, columns, block in render_blocks(field, height, width, corners):
                    pixels[rows, columns] = to_bytes(block)
                    progress.advance(task, block.shape[0] * block.shape[1])
            stats = field.stats()
        save_bytes(picture, pixels)
    result = {
        "picture": str(picture),
        "width": width,
        "height": height,
        "region": corners,
        "step": fitted.step,
        "stats": stats,
    }
    if json_only:
        print_json(result)
    else:
        typer.echo(f"{picture}: {width} x {height} pixels, from step {fitted.step}")


@app.command(
    rich_help_panel=FIELDS, epilog="Example: [bold]dpnc warmup[/bold]   once after installing"
)
def warmup(threads: Threads = None, json_only: Json = False) -> None:
    """Compile every kernel now, so that the first fit does not wait for the compiler."""
    with guarded(), progress_bar() as progress:
        from dpnc.warmup import warm_everything

        compiled = []
        task = progress.add_task("compiling", total=None)
        for name in warm_everything(threads):
            progress.update(task, description=f"compiling for {name}")
            compiled.append(name)
    if json_only:
        print_json({"compiled": compiled})
    else:
        typer.echo(f"kernels for {len(compiled)} kinds of field are compiled")


def run_fit(image_fit: ImageFit, steps: int, commit_every: int) -> tuple[bool, float | None]:
    """Step until `steps` or Ctrl-C, committing on the way; return (stopped, last loss)."""
    from dpnc.stop import StopRequest

    loss = None
    if image_fit.step_count >= steps:
        errors.print(f"the fit is at step {image_fit.step_count} already; nothing to do")
        return False, loss
    with progress_bar() as progress:
        task = progress.add_task("fitting", total=steps, completed=image_fit.step_count)

        with StopRequest() as stop:
            while image_fit.step_count < steps and not stop.requested:
                loss = image_fit.step()
                if image_fit.step_count % commit_every == 0:
                    image_fit.commit()
                    progress.console.print(f"step {image_fit.step_count} is committed")
                progress.update(
                    task, completed=image_fit.step_count, description=f"fitting, loss {loss:.5f}"
                )
            image_fit.commit()
    return image_fit.step_count < steps, loss


def refuse_fixed_options(context: typer.Context) -> None:
    """Refuse, with --resume, what was fixed when the fit was started."""
    free = {"image", "store", "budget", "steps", "resume", "commit_every", "threads", "json_only"}
    for name in sorted(set(context.params) - free):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"{option} was fixed when the fit was started; leave it out")


def parse_region(region: str) -> tuple[float, float, float, float]:
    """Return the four numbers of ``x0,y0,x1,y1``; anything else is an error of usage."""
    from dpnc.errors import ImageError
    from dpnc.image import check_region

    try:
        x0, y0, x1, y1 = (float(part) for part in region.split(","))
        check_region((x0, y0, x1, y1))
    except ImageError as error:
        raise typer.BadParameter(str(error), param_hint="--region") from None
    except ValueError:
        message = f"{region!r} is not four numbers x0,y0,x1,y1"
        raise typer.BadParameter(message, param_hint="--region") from None
    return x0, y0, x1, y1


def output_size(
    region: tuple[float, float, float, float],
    fitted_width: int,
    fitted_height: int,
    width: int | None,
    height: int | None,
) -> tuple[int, int]:
    """Return the size to draw in pixels; what is not given follows the region's proportions."""
    x0, y0, x1, y1 = region
    region_width, region_height = (x1 - x0) * fitted_width, (y1 - y0) * fitted_height
    if width is None and height is None:
        width, height = max(1, round(region_width)), max(1, round(region_height))
    elif width is None and height is not None:
        width = max(1, round(height * region_width / region_height))
    elif height is None and width is not None:
        height = max(1, round(width * region_height / region_width))
    assert width is not None and height is not None
    return width, height
