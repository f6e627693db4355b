"""`llmq history list`, `show`, `plot`, `export`, `import`, `note` and `delete`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import invocation
from llmq.cli import options as o

GROUP = "history"

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="The beginning of its id, latest, or latest~N for the Nth before the latest.")
]
OfModel = Annotated[str | None, typer.Option("--model", help="Only of this model, by the name of its folder or file.")]
OfKind = Annotated[
    str | None, typer.Option("--kind", help="Only of this kind: perplexity, divergence, decode, prefill, quantize, …")
]


def register(_: typer.Typer, group: typer.Typer) -> None:
    """Add the commands."""
    group.command("list")(list_)
    group.command("show")(show)
    group.command("plot")(plot)
    group.command("export")(export)
    group.command("import")(import_)
    group.command("note")(note)
    group.command("delete")(delete)


def list_(
    model: OfModel = None,
    scheme: Annotated[str | None, typer.Option("--scheme", "-s", help="Only of this scheme.")] = None,
    kind: OfKind = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="This many at most, the newest.")] = 20,
    json: o.Json = False,
) -> None:
    """List the runs that were measured, newest first."""
    from llmq.api.history import RunFilter, list_runs
    from llmq.cli import render

    render.run_list(list_runs(RunFilter(model, scheme, kind), limit), json=json)


def show(run: Run, json: o.Json = False) -> None:
    """Show a run as it was measured: its tables, protocol, environment and notes."""
    from llmq.api.history import show_run
    from llmq.cli import render

    stored, found = show_run(run)
    if json:
        render.records_or_json(list(found.records), json=True)
    else:
        render.stored_run(stored, found)


def plot(
    metric: Annotated[str, typer.Argument(metavar="METRIC", help="Such as kl_mean, or with its kind: decode.tokens_per_s.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Picture to write: .png or .svg.")],
    scheme: Annotated[list[str] | None, typer.Option("--scheme", "-s", help="Only this scheme; repeatable.")] = None,
    model: OfModel = None,
    kind: OfKind = None,
    force: o.Force = False,
) -> None:
    """Draw a metric over time, a line a scheme; what must not be compared gets a panel of its own."""
    from llmq.api.history import RunFilter
    from llmq.api.plotting import plot_history
    from llmq.cli import render

    panels = plot_history(metric, tuple(scheme or ()), RunFilter(model, None, kind), out, force=force)
    render.plotted(panels, out)


def export(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Runs by the beginnings of their ids, or latest.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.jsonl", help="File to write.")],
    force: o.Force = False,
) -> None:
    """Write runs to a file of records, with the figures of single tokens in the folder beside it."""
    from llmq.api.history import export_runs
    from llmq.cli import render

    render.exported(export_runs(runs, out, force=force), out)


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.jsonl…", help="Records that --record or export wrote.")],
    note: Annotated[str, typer.Option("--note", help="Anything to remember about them.")] = "",
) -> None:
    """Keep the records of files, a run each; records that are kept already are passed over."""
    from llmq.api.history import import_files
    from llmq.cli import render

    render.imported(import_files(files, command=invocation.command(), note=note))


def note(run: Run, text: Annotated[str, typer.Argument(metavar="TEXT", help="Anything; empty takes a note back.")]) -> None:
    """Put a note to a run, in place of the one it has."""
    from llmq.api.history import annotate_run
    from llmq.cli import render

    render.done(f"run {annotate_run(run, text).short} has this note now")


def delete(run: Run, yes: Annotated[bool, typer.Option("--yes", help="Really.")] = False) -> None:
    """Forget a run and its token figures."""
    from llmq.api.history import delete_run
    from llmq.cli import render
    from llmq.errors import UsageError

    if not yes:
        raise UsageError(f"a run that is deleted is gone; say `llmq history delete {run} --yes`, or export it first.")
    gone = delete_run(run)
    render.done(f"run {gone.short} deleted: {gone.records} records of {gone.command}")
