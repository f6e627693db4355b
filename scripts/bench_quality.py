"""Measure quality at the same bits: llmq's schemes and other quantizers, by one evaluation, with the same calibration windows.

    python scripts/bench_quality.py --model MODEL --env-dir DIR --setup
    python scripts/bench_quality.py --model MODEL --env-dir DIR --rows 'int4*,AutoRound*' --again
    python scripts/bench_quality.py --report

Every tool hands over the weights that its quantized model computes with, as plain floats, and llmq's float32 Llama computes with
them. `--setup` makes an environment for each tool from the package registry, with the versions of configs/peers. Rows whose
records are there are not measured again, so that a run can be stopped and started. docs/quality.md says how it measures.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from peers.environments import Environments
from quality.catalogue import SUITES, Row, Suite, choose
from quality.corpus import Corpus
from quality.evaluation import Evaluator, open_original
from quality.exchange import ARTEFACT, Made
from quality.making import Maker, NotMadeError
from quality.records import RecordFile, measured, refused
from quality.report import write_page

from llmq.api.loading import Setup, open_model
from llmq.cli import render
from llmq.cli.options import names
from llmq.errors import InputError, LlmqError, UsageError, suggest
from llmq.evaluation.divergence import CandidateResult
from llmq.results.environment import available_cores, capture

REPO = Path(__file__).resolve().parent.parent
RECORDS = REPO / "configs" / "quality"
LIMIT = 400
"""Windows of 255 scored tokens: 102,000."""


def say(text: str) -> None:
    """Tell the user what happens."""
    print(text, file=sys.stderr, flush=True)


def pending(suite: Suite, rows: list[Row], file: RecordFile, *, again: bool) -> list[Row]:
    """Return the rows that have to be measured."""
    found = [row for row in rows if again or not file.has(row)]
    say(f"{suite.name}: {len(found)} of {len(rows)} rows to measure")
    return found


def evaluate(folder: Path, made: Made, evaluator: Evaluator) -> CandidateResult:
    """Evaluate what a maker left: its float weights, or llmq's artefact where these are not all that differs."""
    with render.reporting(quiet=True) as progress:
        if made.settings.get("activations") or made.settings.get("rotation"):
            loaded = open_model(str(folder / ARTEFACT), None, Setup(dtype="fp32"))
            return evaluator.model(loaded.runner, progress)
        return evaluator.weights(folder, progress)


def measure(maker: Maker, rows: list[Row], file: RecordFile, limit: int | None, end: float | None) -> bool:
    """Make and evaluate rows, and keep a record of each at once.

    Args:
        maker: of one suite.
        rows: to measure.
        file: of the suite's records.
        limit: windows of the evaluation text.
        end: monotonic time after which no further row is begun.

    Returns:
        whether all rows were done.
    """
    corpus, environment = maker.corpus, capture(maker.threads)
    evaluator: Evaluator | None = None
    try:
        for row in rows:
            if end is not None and time.monotonic() > end:
                return False
            try:
                folder, made = maker.make(row)
                # the original runs only when there is something to compare with it
                evaluator = evaluator or Evaluator(corpus.checkpoint, corpus.tokenizer, corpus.text("test"), limit)
                result = evaluate(folder, made, evaluator)
            except (NotMadeError, InputError) as problem:
                say(f"{row.name} is left out: {problem}")
                file.put(refused(row, corpus, str(problem), environment))
                continue
            file.put(measured(row, corpus, made, result, environment))
            kl = result.divergence.kl_mean
            took = f"{made.cost.cpu_seconds:.0f} CPU s"
            say(f"{row.name}: {made.bits_per_weight:.3f} bits, KL {kl.value:.5f} ± {kl.stderr or 0:.5f}, {took}")
    finally:
        if evaluator is not None:
            evaluator.reference.close()
    return True


def main(  # noqa: PLR0913, PLR0917 - one for each option
    model: Annotated[Path | None, typer.Option("--model", help="The suite's checkpoint.")] = None,
    env_dir: Annotated[Path | None, typer.Option("--env-dir", help="Folder of the environments and of the weights.")] = None,
    suite: Annotated[str, typer.Option("--suite", metavar="|".join(SUITES), help="Model and text.")] = "wt2-8m",
    rows: Annotated[str, typer.Option("--rows", metavar="A,B,…", help="Names or patterns of rows.")] = "*",
    setup: Annotated[bool, typer.Option("--setup", help="Make the environments that are not there.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Make and measure the rows anew, whatever is there.")] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of every tool.")] = available_cores(),
    limit: Annotated[int, typer.Option("--limit", min=1, help="Windows of the evaluation text.")] = LIMIT,
    stop_after: Annotated[float | None, typer.Option("--stop-after", help="Begin no row after so many seconds.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the records.")] = RECORDS,
    report: Annotated[bool, typer.Option("--report", help="Only write docs/quality.md and its figures anew.")] = False,
) -> None:
    """Measure the rows of one suite, or write the page of all records."""
    try:
        if report:
            for path in write_page(REPO):
                say(f"written: {path.relative_to(REPO)}")
            return
        if model is None or env_dir is None:
            raise UsageError(
                "nothing to measure: name a checkpoint with --model and a folder with --env-dir, or ask for --report."
            )
        if suite not in SUITES:
            raise UsageError(f"unknown suite {suite!r}.{suggest(suite, list(SUITES))}")
        end = None if stop_after is None else time.monotonic() + stop_after
        torch.set_num_threads(threads)
        chosen = SUITES[suite]
        file = RecordFile(output / f"{suite}.jsonl", chosen)
        todo = pending(chosen, choose(names(rows), chosen), file, again=again)
        checkpoint = open_original(str(model))
        environments = Environments(env_dir.resolve())
        corpus = Corpus(chosen, checkpoint, environments.folder / "quality" / checkpoint.sha256[:12], say)
        for name in dict.fromkeys(row.environment for row in todo if setup):
            environments.set_up(name, say)
        if not measure(Maker(environments, corpus, threads, say, again=again), todo, file, limit, end):
            say("stopped; run again to go on")
            raise typer.Exit(3)
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
