"""docs/scale.md: the table of the records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmq.files import atomic_path
from llmq.results import figures
from llmq.results.markdown import to_markdown, update_marked_section
from llmq.results.record import ResultRecord
from llmq.results.store import read_records
from llmq.results.table import Column, Table

PAGE, RECORDS, MARKER = "docs/scale.md", "configs/scale/plan.jsonl", "scale-plan"
RACE, RACE_MARKER = "configs/scale/race.jsonl", "scale-race"
RACE_COLUMNS = ("tool", "time", "times", "CPU s", "llmq / tool", "bits/weight", "version")
COLUMNS = ("quantization", "peak, planned", "peak", "planned / peak", "size, planned / written", "time, planned / taken", "CPU s")


def section_text(records: Sequence[ResultRecord]) -> str:
    """Return the Markdown of the records: where they were measured, and a row each."""
    here = records[0].environment
    table = Table(
        title="",
        header={"machine": f"{here.cpu}, {here.cores} cores, {here.threads} threads", "llmq": here.llmq},
        columns=tuple(Column(heading, right=heading != COLUMNS[0]) for heading in COLUMNS),
        rows=tuple(_row(record) for record in records),
        notes=(),
    )
    return to_markdown(table)


def _row(record: ResultRecord) -> tuple[str, ...]:
    value = {name: metric.value for name, metric in record.metrics.items()}
    planned = value.get("planned_seconds")
    return (
        str(record.subject.options["case"]),
        f"{value['planned_peak_bytes'] / 1e9:.2f} GB",
        f"{value['peak_bytes'] / 1e9:.2f} GB",
        f"{value['planned_peak_bytes'] / value['peak_bytes']:.2f}",
        f"{value['planned_size_bytes'] / value['size_bytes']:.3f}",
        figures.ABSENT if planned is None else f"{planned / value['seconds']:.2f}",
        f"{value['cpu_seconds']:.3g}",
    )


def race_text(records: Sequence[ResultRecord]) -> str:
    """Return the Markdown of a race: what was quantized where, and a row a tool."""
    first = records[0]
    calibration = first.subject.options["calibration"]
    table = Table(
        title="",
        header={
            "machine": f"{first.environment.cpu}, {first.environment.cores} cores, {first.environment.threads} threads",
            "quantized": f"{first.subject.model}, on {calibration['windows']} windows of {calibration['length']} tokens",
        },
        columns=tuple(Column(heading, right=heading not in {"tool", "version"}) for heading in RACE_COLUMNS),
        rows=tuple(_race_row(record) for record in records),
        notes=(),
    )
    return to_markdown(table)


def _race_row(record: ResultRecord) -> tuple[str, ...]:
    seconds, options = record.metrics["seconds"], record.subject.options
    tool = next(name for name in options["versions"] if name != "torch")
    return (
        str(options["contender"]),
        f"{seconds.value:.1f} s",
        ", ".join(f"{each:.1f}" for each in seconds.samples or []),
        f"{record.metrics['cpu_seconds'].value:.4g}",
        f"{record.metrics['llmq_share'].value:.2f}",
        f"{record.subject.bits_per_weight:.3f}",
        f"{tool} {options['versions'][tool]}",
    )


def page_text(repo: Path) -> str:
    """Return the page with its sections written anew."""
    text = (repo / PAGE).read_text(encoding="utf-8")
    text = update_marked_section(text, MARKER, section_text(read_records(repo / RECORDS)))
    return update_marked_section(text, RACE_MARKER, race_text(read_records(repo / RACE)))


def write_page(repo: Path) -> bool:
    """Write the page; returns whether it changed."""
    text = page_text(repo)
    if (repo / PAGE).read_text(encoding="utf-8") == text:
        return False
    with atomic_path(repo / PAGE, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True
