"""`llmq report diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli.verdicts import EXIT_CODES, VerdictCommand, could_not_run

GROUP = "report"

Run = "FILE.jsonl that --record wrote, or a run in history."
Tolerances = Annotated[
    Path | None,
    typer.Option("--tolerances", metavar="FILE.toml", help="Tolerances; default: llmq's own, which is configs/regression.toml."),
]


def register(_: typer.Typer, group: typer.Typer) -> None:
    """Add the command."""
    group.command("diff", cls=VerdictCommand, epilog=EXIT_CODES)(diff)


def diff(
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help=f"What is good enough: {Run}")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help=f"What is judged: {Run}")],
    tolerances: Tolerances = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a comment on a pull request.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE.xml", help="Write JUnit XML to this file.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.md", help="Write Markdown to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Judge a run by an earlier one: quality token by token, speed, kernels, size. Ends with a verdict as its exit code."""
    with could_not_run():
        from llmq.api.diffing import DiffFiles, diff_files
        from llmq.cli import render

        files = DiffFiles(markdown=output, junit=junit, force=force)
        found = diff_files(baseline, candidate, tolerances, files)
        render.diff(found, markdown=markdown, json=json)
    raise typer.Exit(found.exit_code)
