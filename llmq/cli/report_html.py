"""`llmq report html` and `llmq report plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import options as o

GROUP = "report"

Runs = Annotated[list[str], typer.Argument(metavar="RUN…", help="FILE.jsonl that --record wrote, or a run in history.")]


def register(_: typer.Typer, group: typer.Typer) -> None:
    """Add the commands."""
    group.command("html")(html)
    group.command("plot")(plot)


def html(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Page to write.", rich_help_panel=o.OUTPUT)],
    force: o.Force = False,
) -> None:
    """Write one page that needs no network: tables, plots, and what stands behind every number.

    Runs that must not be compared get sections of their own, and the page says why.
    """
    from llmq.api.htmling import write_html
    from llmq.api.runs import open_run
    from llmq.cli import render

    with render.reporting() as progress:
        write_html([open_run(run) for run in runs], out, force=force, progress=progress)
    render.pages_written([out])


def plot(
    runs: Runs,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER|FILE.png|FILE.svg",
            help="A folder for every plot as SVG and PNG, or a file for one.",
            rich_help_panel=o.OUTPUT,
        ),
    ],
    which: Annotated[
        str,
        typer.Option(
            "--which",
            metavar="NAME,…",
            help="size, speed, kl, roofline, latency, sqnr, loss, bits, cost, alone, output-error. "
            "Default: all that the records have.",
        ),
    ] = "",
    force: o.Force = False,
) -> None:
    """Write the plots of `llmq report html` as files."""
    from llmq.api.htmling import write_plots
    from llmq.api.runs import open_run
    from llmq.cli import render

    with render.reporting() as progress:
        written = write_plots([open_run(run) for run in runs], out, o.names(which), force=force, progress=progress)
    render.pages_written(written)
