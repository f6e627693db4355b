"""`llmq ci`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import options as o
from llmq.cli.verdicts import EXIT_CODES, VerdictCommand, could_not_run

GROUP = ""
DEFAULT_RECIPE = Path("configs/recipes/wt2-8m.toml")


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the command."""
    app.command("ci", cls=VerdictCommand, epilog=EXIT_CODES)(ci)


def ci(
    recipe: Annotated[Path, typer.Argument(metavar="[RECIPE.toml]", help="What to measure.")] = DEFAULT_RECIPE,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="PATH", help="Judge this checkpoint, or artefact of one of the recipe's schemes, as the recipe's."
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE.jsonl", help="Another baseline than the recipe's.")
    ] = None,
    tolerances: Annotated[
        Path | None, typer.Option("--tolerances", metavar="FILE.toml", help="Other tolerances than the recipe's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Write diff.md, diff.json, junit.xml, run.jsonl and report.html there, over earlier ones.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed too.")] = True,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Measure, and write the baseline instead of judging by it.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.", rich_help_panel=o.OUTPUT)] = False,
) -> None:
    """Measure what a recipe names and judge it by the committed baseline. Ends with a verdict as its exit code.

    Where GITHUB_STEP_SUMMARY names a file, the Markdown is appended to it.
    """
    with could_not_run():
        import os

        from llmq.api.ci import GateRequest, run_gate
        from llmq.cli import processes, render

        processes.refuse_several()
        request = GateRequest(recipe, model, baseline, tolerances, out, speed, update_baseline)
        with render.reporting(quiet=json) as progress:
            result = run_gate(request, environ=os.environ, progress=progress)
        render.save_records(result.records, None)
        render.gate(result, json=json)
    raise typer.Exit(result.diff.exit_code if result.diff else 0)
