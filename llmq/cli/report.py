"""`llmq report table`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

GROUP = "report"


def register(_: typer.Typer, group: typer.Typer) -> None:
    """Add the command."""
    group.command("table")(table)


def table(
    records: Annotated[list[Path], typer.Argument(metavar="FILE.jsonl…", help="Records that --record wrote.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Print the comparison table of stored records; refuses to mix protocols, texts or machines."""
    from llmq.api.reporting import table_of
    from llmq.cli import render

    render.stored_table(table_of(records), markdown=markdown)
