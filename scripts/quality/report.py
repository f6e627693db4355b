"""docs/quality.md: tables and plots, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmq.errors import UsageError
from llmq.files import atomic_path
from llmq.results import figures
from llmq.results.markdown import to_markdown, update_marked_section
from llmq.results.record import Metric, ResultRecord
from llmq.results.store import read_records
from llmq.results.table import Column, Table
from quality.plot import Point, scatter

PAGE, RECORDS = "docs/quality.md", "configs/quality"
COLUMNS = ("weights", "bits/weight", "KL (nats/token)", "of the first", "same top-1", "perplexity", "windows", "CPU s")
MOST_BITS = 6.0
"""Of the plot: activations of 8 bits are no matter of weights."""


def marker(stem: str) -> str:
    """Return the marked section of the records `stem`.jsonl."""
    return f"quality-{stem}"


def section_text(path: Path) -> str:
    """Return the Markdown of one suite's records: what holds for all of them, a table a section, notes, and the plot."""
    records = read_records(path)
    done = [record for record in records if record.metrics]
    if not done:
        raise UsageError(f"no row of {path} was measured; run scripts/bench_quality.py.")
    check_one_protocol(done)
    parts = [_header(done), f"![KL against bits per weight]({plot_name(path.stem)})"]
    for section in dict.fromkeys(str(record.subject.options["section"]) for record in records):
        own = [record for record in records if record.subject.options["section"] == section]
        base = own[0].subject.options["base"]
        own = [*(record for record in records if record.subject.scheme == base), *own]
        parts.append(f"### {section}\n\n{to_markdown(_table(section, own))}")
    return "\n\n".join(parts)


def plot_name(stem: str) -> str:
    """Return the name of a suite's plot, which lies beside the page."""
    return f"quality-{stem}.svg"


def plot_text(path: Path) -> str:
    """Return the SVG of one suite's records: KL against bits per weight."""
    points = [
        Point(record.subject.scheme, str(record.subject.options["tool"]), record.subject.bits_per_weight, kl.value)
        for record in read_records(path)
        if (kl := record.metrics.get("kl_mean")) is not None
        and record.subject.bits_per_weight is not None
        and record.subject.bits_per_weight <= MOST_BITS
    ]
    return scatter(points, "bits per weight", "KL, nats per token")


def check_one_protocol(records: Sequence[ResultRecord]) -> None:
    """Raise UsageError when two records were not measured alike."""
    first = records[0]
    for record in records[1:]:
        for what, mine, other in (
            ("checkpoint", first.subject.checkpoint_sha256, record.subject.checkpoint_sha256),
            ("protocol", first.protocol, record.protocol),
        ):
            if mine != other:
                raise UsageError(
                    f"records of {first.subject.scheme!r} and {record.subject.scheme!r} differ in their {what}; "
                    "measure one of them again (--rows NAME --again)."
                )


def generated(repo: Path) -> dict[Path, str]:
    """Return the text of the page's plots by path, for every file of records."""
    return {repo / "docs" / plot_name(path.stem): plot_text(path) for path in record_files(repo)}


def record_files(repo: Path) -> list[Path]:
    """Return the files of records, in the order of their names."""
    return sorted((repo / RECORDS).glob("*.jsonl"))


def write_page(repo: Path) -> list[Path]:
    """Write the page's sections and its plots anew; returns what changed."""
    page = repo / PAGE
    text = page.read_text(encoding="utf-8")
    for path in record_files(repo):
        text = update_marked_section(text, marker(path.stem), section_text(path))
    texts = {page: text, **generated(repo)}
    changed = [path for path, new in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != new]
    for path in changed:
        with atomic_path(path, force=True) as temporary:
            temporary.write_text(texts[path], encoding="utf-8")
    return changed


def _header(records: Sequence[ResultRecord]) -> str:
    first = records[0]
    params = first.protocol.params
    here = first.environment
    versions = {f"{name} {number}" for record in records for name, number in record.subject.options["versions"].items()}
    original = first.metrics["reference_perplexity"].value
    calibration = next((found for record in records if (found := record.subject.options["calibration"])), None)
    threads = sorted({record.environment.threads for record in records})
    lines = {
        "model": f"{first.subject.model} (sha256 {first.subject.checkpoint_sha256[:12]}), perplexity {original:.2f} in fp32",
        "text": f"{params['text']} (sha256 {params['text_sha256'][:12]})",
        "protocol": f"{first.protocol.name} v{first.protocol.version}: windows of {params['length']} tokens, "
        f"BOS {params['bos']}; {params['n_windows']:,} windows, {params['n_scored_tokens']:,} scored tokens",
        "calibration": "none"
        if calibration is None
        else f"{calibration['text']}, windows of {calibration['length']} tokens drawn with seed {calibration['seed']}",
        "machine": f"{here.cpu}, {here.cores} cores; threads: {' or '.join(map(str, threads))}",
        "versions": ", ".join(sorted(versions)),
    }
    return "  \n".join(f"**{key}:** {value}" for key, value in lines.items())


def _table(section: str, records: Sequence[ResultRecord]) -> Table:
    base = next((record.metrics["kl_mean"].value for record in records if record.metrics), None)
    notes = [f"{record.subject.scheme}: {about}." for record in records if (about := record.subject.options["about"])]
    notes += [f"{record.subject.scheme}: {note}" for record in records for note in _few(record.notes)]
    return Table(
        title=section,
        header={},
        columns=tuple(Column(heading, right=heading != "weights") for heading in COLUMNS),
        rows=tuple(_row(record, base) for record in records),
        notes=tuple(notes),
    )


def _few(notes: Sequence[str]) -> list[str]:
    """Return notes, all of those alike but the first as a number."""
    if len(notes) <= 2:
        return [note.rstrip(".") + "." for note in notes]
    return [f"{notes[0].rstrip('.')}, and {len(notes) - 1} more such notes."]


def _row(record: ResultRecord, base: float | None) -> tuple[str, ...]:
    subject = record.subject
    name = f"{subject.scheme} (llmq)" if subject.options["tool"] == "llmq" else subject.scheme
    calibration = subject.options["calibration"]
    bits = figures.ABSENT if subject.bits_per_weight is None else f"{subject.bits_per_weight:.3f}"
    kl, cpu = record.metrics.get("kl_mean"), record.metrics.get("quantize_cpu_seconds")
    return (
        name,
        bits,
        _figure(kl),
        figures.ABSENT if kl is None or base is None else f"{kl.value / base:.2f}",
        _figure(record.metrics.get("top1_agreement"), percent=True),
        _figure(record.metrics.get("perplexity")),
        str(calibration["windows"]) if calibration else "none",
        figures.ABSENT if cpu is None else f"{cpu.value:.3g}",
    )


def _figure(metric: Metric | None, *, percent: bool = False) -> str:
    if metric is None:
        return figures.ABSENT
    return figures.with_error(metric.value, metric.stderr, factor=100.0 if percent else 1.0, unit=" %" if percent else "")
