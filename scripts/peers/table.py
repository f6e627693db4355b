"""The table of llmq beside other engines, made of records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmq.benchmark.order_statistics import median, median_interval
from llmq.results import figures
from llmq.results.record import ResultRecord
from llmq.results.table import Column, Table


def peers_table(records: Sequence[ResultRecord]) -> Table:
    """Lay out the records of one run: a row for each variant, speeds with the ratio of llmq's fastest variant of the same bits.

    A ratio's brackets are the order-statistic interval of the median of the rounds' ratios (95 % from 6 rounds on).
    """
    by_variant: dict[str, dict[str, ResultRecord]] = {}
    for record in records:
        by_variant.setdefault(record.subject.scheme, {})[record.protocol.params.get("task", "refusal")] = record
    tasks = list(dict.fromkeys(task for found in by_variant.values() for task in found if task != "refusal"))
    rows = [_row(found, tasks, by_variant) for found in by_variant.values()]
    headings = ["weights", "head", "GB"]
    for task in tasks:
        headings += [f"{task} tok/s", "llmq ÷ this"] + (["of floor"] if task.startswith("decode") else [])
    first = records[0]
    return Table(
        title=f"{first.subject.model}: llmq and peers",
        header=_header(records),
        columns=tuple(Column(heading, right=heading not in ("weights", "head")) for heading in headings),
        rows=tuple(rows),
        notes=tuple(_notes(by_variant)),
    )


def _row(
    found: Mapping[str, ResultRecord], tasks: Sequence[str], everyone: Mapping[str, Mapping[str, ResultRecord]]
) -> tuple[str, ...]:
    any_record = next(iter(found.values()))
    subject = any_record.subject
    size = figures.ABSENT if subject.size_bytes is None else f"{subject.size_bytes / 1e9:.3g}"
    cells = [subject.scheme, str(subject.options.get("head", figures.ABSENT)), size]
    for task in tasks:
        record = found.get(task)
        cells.append(figures.ABSENT if record is None else figures.plain(record.metrics["tokens_per_s"].value, 3))
        cells.append(figures.ABSENT if record is None else _ratio(record, task, everyone))
        if task.startswith("decode"):
            cells.append(figures.ABSENT if record is None else f"{record.metrics['bandwidth_share'].value:.0%}")
    return tuple(cells)


def _ratio(record: ResultRecord, task: str, everyone: Mapping[str, Mapping[str, ResultRecord]]) -> str:
    """Return the ratio of llmq's fastest variant of the same bits to this peer, with its interval."""
    speedups = {name: metric for name, metric in record.metrics.items() if name.startswith("speedup_of_")}
    if not speedups:
        return ""
    fastest = max(speedups, key=lambda name: everyone[name.removeprefix("speedup_of_")][task].metrics["tokens_per_s"].value)
    samples = speedups[fastest].samples or []
    low, high, _ = median_interval(samples)
    return f"{median(samples):.2f} [{low:.2f}, {high:.2f}]"


def _header(records: Sequence[ResultRecord]) -> dict[str, str]:
    here = records[0].environment
    walls = [record.metrics["machine_bandwidth_gbps"].value for record in records if "machine_bandwidth_gbps" in record.metrics]
    rounds = [len(record.metrics["seconds"].samples or []) for record in records if "seconds" in record.metrics]
    versions = dict.fromkeys(part for record in records for part in _versions(record))
    return {
        "model": records[0].subject.model,
        "date": f"{records[0].created_at:%Y-%m-%d}",
        "machine": f"{here.cpu}, {here.cores} cores, {here.threads} threads",
        "floor of decoding": f"bytes that a step reads / {walls[0]:.1f} GB/s, the measured read bandwidth"
        if walls
        else "not known",
        "rounds": str(max(rounds, default=0)),
        "versions": ", ".join(versions),
    }


def _versions(record: ResultRecord) -> list[str]:
    """Return 'name version' of all that an engine is made of."""
    engine, version = record.subject.options["engine"], record.subject.options.get("version")
    if version is None:
        return []
    return [part if " " in part else f"{engine} {part}" for part in str(version).split(", ")]


def _notes(by_variant: Mapping[str, Mapping[str, ResultRecord]]) -> list[str]:
    found = []
    for name, records in by_variant.items():
        about = next(iter(records.values())).subject.options.get("about")
        found += [f"{name}: {about}."] if about else []
        found += [f"{name}: {note}." for note in records["refusal"].notes] if "refusal" in records else []
        busy = [note for record in records.values() for note in record.notes if note.startswith("engines that waited")]
        found += [f"{name}: {busy[0]}."] if busy else []
    found.append("llmq ÷ this: how much faster llmq's fastest variant of the same bits was, median of the rounds' ratios.")
    return found
