"""How the verdicts of a diff are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from llmq.cli.render.console import grid, print_json, stderr, stdout

if TYPE_CHECKING:
    from llmq.api.ci import GateResult
    from llmq.results.diff import Diff
    from llmq.results.verdict import Outcome

_STYLES: dict[Outcome, str] = {
    "pass": "green",
    "note": "dim",
    "warn": "yellow",
    "fail": "bold red",
    "incomparable": "bold magenta",
}
_RESULTS = {"fine": "green", "regression": "bold red", "not comparable": "bold magenta"}


def diff(found: Diff, *, markdown: bool = False, json: bool = False) -> None:
    """Show the verdicts: a table, then the reasons, then the result on the last line."""
    if json:
        print_json(found.model_dump(mode="json"))
        return
    if markdown:
        from llmq.results.diff import diff_markdown

        Console(width=10_000, markup=False, highlight=False).out(diff_markdown(found), highlight=False)
        return
    from llmq.results.diff import findings_table

    console = stdout()
    console.print(f"\n[bold]{escape(found.candidate)}[/bold] against [bold]{escape(found.baseline)}[/bold]", soft_wrap=True)
    for side, machine in found.machines.items():
        console.print(f"  [dim]{side:<10}[/dim]{escape(machine)}", soft_wrap=True)
    console.print()
    table = findings_table(found.findings)
    columns = [(column.heading, "right" if column.right else "left") for column in table.columns]
    rows = [
        [*(escape(cell) for cell in row[:-1]), f"[{_STYLES[finding.outcome]}]{row[-1]}[/]"]
        for row, finding in zip(table.rows, found.findings, strict=True)
    ]
    console.print(grid(columns, rows))
    console.print()
    for line in [*found.reasons(), *found.notes]:
        console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)
    console.print(f"[{_RESULTS[found.result]}]{escape(found.headline())}[/]", soft_wrap=True)


def gate(result: GateResult, *, json: bool) -> None:
    """Show what `llmq ci` found, or that it has written a baseline."""
    if result.diff is None:
        stderr().print(
            f"  {len(result.records)} records written to {result.baseline}; commit it and its .tokens folder", soft_wrap=True
        )
        return
    diff(result.diff, json=json)
    for path in result.written:
        stderr().print(f"  written: {path}", soft_wrap=True)
