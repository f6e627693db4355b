"""The only place that prints: consoles, progress, records."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar
from rich.table import Table

from llmq.cli import invocation
from llmq.errors import LlmqError
from llmq.progress import Progress

if TYPE_CHECKING:
    from llmq.results.record import ResultRecord

PLAIN_WIDTH = 200
"""Columns assumed where the output is no terminal, so that a table in a log keeps one line a row."""


def stdout() -> Console:
    """Console for results."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def stderr() -> Console:
    """Console for progress and notes, so that standard output holds results alone."""
    return Console(stderr=True, highlight=False)


class Bars:
    """Progress bars with time left, on a terminal; one line as each long task ends, elsewhere."""

    SLOW_S = 2.0

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: RichBar | None = None

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """See `llmq.progress.Progress`."""
        started = time.monotonic()
        if not self.console.is_terminal:
            yield lambda _: None
            took = time.monotonic() - started
            if took > self.SLOW_S:
                self.console.print(f"  {description}: {total} done in {took:.0f} s")
            return
        outer = self.bar is None
        if self.bar is None:
            self.bar = RichBar(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
        bar = self.bar
        task = bar.add_task(description, total=total)
        try:
            yield lambda steps: bar.update(task, advance=steps)
        finally:
            bar.remove_task(task)
            if outer:
                bar.stop()
                self.bar = None

    def note(self, message: str) -> None:
        """See `llmq.progress.Progress`."""
        self.console.print(f"  {message}", soft_wrap=True)


@contextmanager
def reporting(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield the listener that library code reports to; `quiet` hears nothing."""
    from llmq.progress import SILENT

    yield SILENT if quiet else Bars(stderr())


def show(table: Table, *, title: str = "", notes: list[str] | None = None) -> None:
    """Print a table under its title, and each note on a line of its own."""
    console = stdout()
    if title:
        console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)
    console.print(table)
    for note in notes or []:
        console.print(f"[dim]{note}[/dim]", soft_wrap=True)


def grid(columns: list[tuple[str, str]], rows: list[list[str]]) -> Table:
    """Build a table of (heading, 'left' or 'right') columns; text in the first and last folds on a narrow terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, (heading, justify) in enumerate(columns):
        folds = justify == "left" and index in (0, len(columns) - 1)
        table.add_column(
            heading,
            justify="right" if justify == "right" else "left",
            no_wrap=not folds,
            overflow="fold",
            min_width=12 if folds else None,
        )
    for row in rows:
        table.add_row(*row)
    return table


def save_records(records: list[ResultRecord], path: Path | None) -> None:
    """Keep the records as one run of history, and append them to a JSONL file when one is named."""
    _keep(records)
    if path is None:
        return
    from llmq.results.store import append_records

    append_records(path, records)
    stderr().print(f"  {len(records)} record{'s' if len(records) != 1 else ''} appended to {path}", soft_wrap=True)


def _keep(records: list[ResultRecord]) -> None:
    """Put the records into history, unless it is off; where that fails, the result is shown all the same."""
    from llmq.results.history import SHORT, history_path, open_history

    path = history_path()
    if path is None or not records:
        return
    try:
        with open_history(path, create=True) as history:
            saved = history.save(records, command=invocation.command())
    except LlmqError as error:
        stderr().print(f"  note: this run was not kept in history: {error}", markup=False, soft_wrap=True)
        return
    if saved.run is not None:
        before = "" if saved.added else " already"
        stderr().print(f"[dim]  run {saved.run[:SHORT]} is{before} in history[/dim]", soft_wrap=True)


def print_json(data: object) -> None:
    """Print one JSON document on standard output."""
    import sys

    sys.stdout.write(json_module.dumps(data, indent=2, default=str) + "\n")


def records_or_json(records: list[ResultRecord], *, json: bool) -> None:
    """Print the records as one JSON document when `json` asks for it."""
    if json:
        print_json({"records": [record.model_dump(mode="json") for record in records]})


def size(value: int | float) -> str:
    """Write a number of bytes in decimal units with three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value / factor < 100 else f"{value / factor:.0f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Write a time span with two units, such as '3 min 20 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
