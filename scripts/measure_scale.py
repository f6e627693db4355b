"""Measure what quantizing large models takes, beside what `llmq plan` said before: peak memory, size and time.

    python scripts/measure_scale.py --models DIR --rows '40M*,36M*'
    python scripts/measure_scale.py --models DIR --rows '7B*' --threads 2 --timed
    python scripts/measure_scale.py --report

Checkpoints are random, written into DIR when they are not there (7B with 32 blocks: 13.5 GB) and left there. A row replaces the
record that it has in configs/scale; docs/scale.md says what the figures mean.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from scale.catalogue import CASES, choose
from scale.page import RECORDS, write_page
from scale.running import Runner

from llmq.cli.options import names
from llmq.errors import LlmqError, UsageError
from llmq.files import atomic_path
from llmq.results.environment import available_cores
from llmq.results.record import ResultRecord
from llmq.results.store import append_records, read_records

REPO = Path(__file__).resolve().parent.parent
ASSETS = REPO / "llmq" / "assets"


def put(path: Path, record: ResultRecord) -> None:
    """Replace the record of the same case, in the catalogue's order."""
    held = {str(each.subject.options["case"]): each for each in (read_records(path) if path.exists() else [])}
    held[str(record.subject.options["case"])] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, force=True) as temporary:
        append_records(temporary, [held[case.name] for case in CASES if case.name in held])


def main(  # noqa: PLR0913, PLR0917 - one for each option
    models: Annotated[Path | None, typer.Option("--models", help="Folder of the checkpoints.")] = None,
    rows: Annotated[str, typer.Option("--rows", metavar="A,B,…", help="Names or patterns of cases.")] = "*",
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Checkpoint whose tokenizer is taken.")] = ASSETS / "wt2-8m",
    text: Annotated[Path, typer.Option("--text", help="Calibration text.")] = ASSETS / "sample" / "calibration.txt",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of llmq.")] = available_cores(),
    timed: Annotated[bool, typer.Option("--timed", help="Predict the time too, which quantizes a block.")] = False,
    output: Annotated[Path, typer.Option("--output", help="File of the records.")] = REPO / RECORDS,
    report: Annotated[bool, typer.Option("--report", help="Only write docs/scale.md anew.")] = False,
) -> None:
    """Measure cases, or write the page of all records."""
    try:
        if report:
            print("written" if write_page(REPO) else "up to date", file=sys.stderr)
            return
        if models is None:
            raise UsageError("nothing to measure: name a folder for the checkpoints with --models, or ask for --report.")
        runner = Runner(models.resolve(), tokenizer, text, threads, timed)
        for case in choose(list(names(rows))):
            record = runner.measure(case)
            put(output, record)
            planned, peak = record.metrics["planned_peak_bytes"].value, record.metrics["peak_bytes"].value
            print(f"{case.name}: {peak / 1e9:.2f} GB, {planned / 1e9:.2f} planned", file=sys.stderr, flush=True)
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
