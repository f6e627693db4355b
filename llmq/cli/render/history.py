"""How history is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.cli.render.console import grid, print_json, show, stdout
from llmq.cli.render.tables import table
from llmq.results.figures import size

if TYPE_CHECKING:
    from llmq.api.history import Imported
    from llmq.results.history import StoredRun
    from llmq.results.record import Environment
    from llmq.results.run import Run
    from llmq.results.timeline import Panel

_NAMES = 4
"""Schemes of a run that a list names; the others are counted."""


def run_list(runs: Sequence[StoredRun], *, json: bool) -> None:
    """Show one line a run."""
    if json:
        facts = ("id", "command", "llmq", "note", "records", "models", "schemes", "kinds")
        print_json({"runs": [{"created_at": run.created_at.isoformat()} | {f: getattr(run, f) for f in facts} for run in runs]})
        return
    if not runs:
        done("history has no such runs; every command that measures adds one")
        return
    columns = [("run", "left"), ("measured", "left"), ("model", "left"), ("schemes", "left"), ("kinds", "left")]
    columns += [("records", "right"), ("command or note", "left")]
    rows = [
        [
            run.short,
            f"{run.created_at.astimezone():%Y-%m-%d %H:%M}",
            _few(run.models, 1),
            _few(run.schemes, _NAMES),
            _few(run.kinds, _NAMES),
            str(run.records),
            run.note or run.command,
        ]
        for run in runs
    ]
    show(grid(columns, rows))


def stored_run(stored: StoredRun, run: Run) -> None:
    """Show a run: where it comes from, its tables, and the environments that it was measured in."""
    from llmq.results.run_table import tables_of

    console = stdout()
    console.print(f"\n[bold]run {stored.short}[/bold], {stored.created_at.astimezone():%Y-%m-%d %H:%M:%S %Z}", soft_wrap=True)
    facts = {"id": stored.id, "command": stored.command, "llmq": stored.llmq, "note": stored.note}
    for key, value in facts.items():
        if value:
            console.print(f"  {key:<9} {value}", markup=False, soft_wrap=True)
    for content in tables_of(run.records):
        table(content)
    environments = list({record.environment.model_dump_json(): record.environment for record in run.records}.values())
    for index, environment in enumerate(environments):
        title = "Environment" if len(environments) == 1 else f"Environment {index + 1} of {len(environments)}"
        console.print(f"\n[bold]{title}[/bold]")
        for key, value in _environment(environment).items():
            console.print(f"  {key:<9} {value}", markup=False, soft_wrap=True)


def plotted(panels: Sequence[Panel], out: Path) -> None:
    """Say what was drawn."""
    points = sum(len(series.points) for panel in panels for series in panel.series)
    several = f" in {len(panels)} panels" if len(panels) > 1 else ""
    done(f"{points} figures of {sum(len(panel.series) for panel in panels)} series drawn{several}: {out}")


def exported(records: int, out: Path) -> None:
    """Say what was written."""
    done(f"{records} records written to {out}")


def imported(files: Sequence[Imported]) -> None:
    """Say what became of each file."""
    for each in files:
        known = f", {each.saved.known} were there already" if each.saved.known else ""
        run = f" as run {each.saved.run[:8]}" if each.saved.run and each.saved.added else ""
        done(f"{each.path}: {each.saved.added} records imported{run}{known}")
        if each.bare:
            done(f"  note: the token figures of {each.bare} records are not beside it; comparisons of them will not be paired")


def done(message: str) -> None:
    """Say one thing."""
    stdout().print(message, markup=False, soft_wrap=True)


def _few(names: Sequence[str], most: int) -> str:
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _environment(here: Environment) -> dict[str, str]:
    return {
        "machine": f"{here.cpu}, {here.device}, {here.threads} threads of {here.cores} cores, {size(here.memory_bytes)} memory",
        "features": " ".join(here.cpu_features) or "none known",
        "platform": f"{here.platform}, Python {here.python}, llmq {here.llmq}",
        "packages": ", ".join(f"{name} {version}" for name, version in here.packages.items()),
    }
