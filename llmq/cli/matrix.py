"""`llmq matrix`: schemes × group sizes × calibration sets × seeds from one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import options as o

GROUP = ""


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the command."""
    app.command("matrix")(matrix)


def matrix(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to measure; see docs/matrix.md.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Where finished cells are kept; the same command goes on there."),
    ],
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what is finished, and begin anew.")] = False,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    kernel: o.Kernel = None,
    runtime: o.Runtime = "auto",
    json: o.Json = False,
) -> None:
    """Measure every cell of a recipe: schemes, group sizes, calibration sets and seeds; stop and go on at any point."""
    from llmq.api.matrix import run_matrix
    from llmq.cli import render

    with render.reporting(quiet=json) as progress:
        setup = o.setup(device, "bf16", threads, kernel, runtime=runtime)
        result = run_matrix(recipe, out, setup, restart=restart, progress=progress)
    render.save_records(result.records, None)
    render.matrix(result, json=json)
