"""The gate of a pipeline: measure what a recipe names, judge it by the committed baseline, write the reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmq.api.diffing import RATIO_TO, diff_runs, floor_of, ratio_name
from llmq.api.gate_measuring import Gate, measure_gate, measure_speed
from llmq.api.gate_recipe import SpeedPair, read_recipe
from llmq.api.htmling import write_html
from llmq.errors import InputError, OutputError, UsageError
from llmq.files import atomic_path
from llmq.progress import SILENT, Progress
from llmq.results.diff import Diff, diff_markdown
from llmq.results.junit import write_junit
from llmq.results.pairing import SPEED, Pair, labelled
from llmq.results.record import ResultRecord
from llmq.results.replacing import replace_records
from llmq.results.run import Run, read_run, run_in_memory
from llmq.results.table import subject_key
from llmq.results.tolerances import Tolerances, read_tolerances
from llmq.results.verdict import Finding, Metered, judge_minimum

STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable that names a file of Markdown, which GitHub shows with the job."""


@dataclass(frozen=True)
class GateRequest:
    """What `llmq ci` is asked.

    Attributes:
        recipe: the file.
        model: a checkpoint, or an artefact of one of the recipe's schemes, that is judged in place of the recipe's model.
        baseline: another file than the recipe's.
        tolerances: another file than the recipe's.
        out: folder for the reports; files of an earlier run are replaced.
        speed: whether it is measured.
        update_baseline: write the baseline instead of judging by it.
    """

    recipe: Path
    model: Path | None = None
    baseline: Path | None = None
    tolerances: Path | None = None
    out: Path | None = None
    speed: bool = True
    update_baseline: bool = False


@dataclass(frozen=True)
class GateResult:
    """What came out. `diff` is None where the baseline was written."""

    records: list[ResultRecord]
    baseline: Path
    diff: Diff | None
    written: list[Path] = field(default_factory=list)


def run_gate(request: GateRequest, *, environ: Mapping[str, str], progress: Progress = SILENT) -> GateResult:
    """Measure what the recipe names and judge it by the baseline, or write the baseline.

    Raises:
        LlmqError: something is missing or damaged; recipe, tolerances and baseline are read before anything is measured.
    """
    if request.update_baseline and (request.model is not None or not request.speed):
        raise UsageError("--update-baseline measures the whole recipe; leave out --model and --no-speed.")
    recipe, paths = read_recipe(request.recipe)
    limits = read_tolerances(request.tolerances or paths.tolerances)
    place = request.baseline or paths.baseline
    gate = Gate(recipe, paths, request.model)
    if request.update_baseline:
        records = measure_gate(gate, speed=True, progress=progress)
        records += measure_speed(gate, progress=progress) if gate.pairs else []
        replace_records(place, records)
        return GateResult(records, place, None)
    baseline = _asked(_read_baseline(place, request.recipe), gate, speed=request.speed)
    quality = measure_gate(gate, speed=request.speed, progress=progress)
    records, diff = _judged(gate, baseline, quality, limits, speed=request.speed and bool(gate.pairs), progress=progress)
    written = _write(request.out, records, diff, baseline, progress) if request.out is not None else []
    if environ.get(STEP_SUMMARY):
        _append_summary(Path(environ[STEP_SUMMARY]), diff)
    return GateResult(records, place, diff, written)


def _read_baseline(place: Path, recipe: Path) -> Run:
    if not place.is_file():
        raise InputError(f"there is no baseline {place}; `llmq ci {recipe} --update-baseline` writes it: commit it then.")
    return read_run(place)


def _asked(baseline: Run, gate: Gate, *, speed: bool) -> Run:
    """Return the baseline without what this run does not measure on purpose, so that none of it counts as missing."""
    names = {(entry.name, json.dumps(gate.recipe_of(entry).resolve().options_json(), sort_keys=True)) for entry in gate.entries}
    kept = [
        record
        for record in baseline.records
        if (speed or record.kind not in SPEED)
        and (not gate.partial or (record.subject.scheme, json.dumps(record.subject.options, sort_keys=True)) in names)
    ]
    return Run(baseline.name, tuple(kept), baseline.tokens_of)


def _judged(
    gate: Gate, baseline: Run, quality: list[ResultRecord], limits: Tolerances, *, speed: bool, progress: Progress
) -> tuple[list[ResultRecord], Diff]:
    """Judge quality once, and speed until it passes or has failed as often as the recipe says: noise does not repeat itself."""
    attempts = gate.recipe.speed.attempts if speed and gate.recipe.speed else 1
    name = gate.recipe.model if gate.model is None else str(gate.model)
    for attempt in range(1, attempts + 1):
        measured = measure_speed(gate, progress=progress) if speed else []
        if gate.partial:  # the other side of a pair is no candidate
            keys = {subject_key(record.subject) for record in quality}
            measured = [record for record in measured if subject_key(record.subject) in keys]
        records = [*quality, *measured]
        demanded = _demanded(gate, [*baseline.records, *quality], measured, limits)
        run = run_in_memory(name, records)
        diff = diff_runs(baseline, run, limits, further=demanded, speed_of=lambda pair: _stored_ratios(gate, pair))
        slow = [finding for finding in diff.findings if finding.kind in SPEED and finding.outcome == "fail"]
        if not slow:
            break
        if attempt < attempts:
            progress.note(f"{slow[0].subject}: {slow[0].reason}; measuring speed again ({attempt} of {attempts} failed)")
    if speed and attempt > 1:
        ended = "each failed" if slow else f"the first {attempt - 1} failed, the last passed"
        said = f"speed was measured {attempt} times: {ended}"
        diff = diff.model_copy(update={"notes": [*diff.notes, said]})
    if gate.partial:
        said = f"{gate.model} is an artefact of {gate.entries[0].id}; the recipe's other schemes were not measured"
        diff = diff.model_copy(update={"notes": [*diff.notes, said]})
    return records, diff


def _stored_ratios(gate: Gate, pair: Pair) -> list[str]:
    """Return the ratios that are judged by the baseline's: those of which no minimum is demanded."""
    free = {(each.phase, RATIO_TO + each.against) for each in _pairs_of(gate, pair.candidate) if each.min_ratio is None}
    return [name for kind, name in sorted(free) if kind == pair.kind and name in pair.baseline.metrics]


def _pairs_of(gate: Gate, record: ResultRecord) -> list[SpeedPair]:
    """Return the speed pairs whose candidate a record is of."""
    entries = {entry.id: gate.recipe_of(entry).resolve() for entry in gate.entries}
    own = (record.subject.scheme, record.subject.options)
    return [pair for pair in gate.pairs if (entries[pair.candidate].name, entries[pair.candidate].options_json()) == own]


def _demanded(gate: Gate, others: list[ResultRecord], measured: list[ResultRecord], limits: Tolerances) -> list[Finding]:
    """Judge the ratios of which a minimum is demanded; `others` are what the labels have to tell them from."""
    subjects = list({subject_key(record.subject): record.subject for record in [*others, *measured]}.values())
    found = []
    for record in measured:
        for pair in _pairs_of(gate, record):
            metric = record.metrics.get(RATIO_TO + pair.against)
            if pair.min_ratio is None or pair.phase != record.kind or metric is None or metric.samples is None:
                continue
            name = f"{record.kind} {ratio_name(RATIO_TO + pair.against)}"
            what = Metered(labelled(record.subject, subjects), record.kind, name, "x", worse=-1)
            floor = floor_of([record], RATIO_TO + pair.against, limits) or 0.0
            found.append(judge_minimum(what, metric.samples, pair.min_ratio, limits.speed, floor))
    return found


def _write(out: Path, records: list[ResultRecord], diff: Diff, baseline: Run, progress: Progress) -> list[Path]:
    """Write the report files into a folder, each whole, over those of an earlier run."""
    names = ("diff.md", "diff.json", "junit.xml", "run.jsonl", "report.html")
    markdown, data, junit, run, html = (out / name for name in names)
    for path, text in ((markdown, diff_markdown(diff)), (data, diff.model_dump_json(indent=2))):
        with atomic_path(path, force=True) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    write_junit(diff, junit)
    replace_records(run, records)
    write_html([baseline, run_in_memory(diff.candidate, records)], html, force=True, progress=progress)
    return [markdown, data, junit, run, html]


def _append_summary(path: Path, diff: Diff) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{diff_markdown(diff)}\n")
    except OSError as error:
        raise OutputError(f"cannot append to {path}, which {STEP_SUMMARY} names: {error.strerror or error}.") from error
