"""Records of one suite: one a row, in the catalogue's order; the newest of a row counts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

from llmq.evaluation.divergence import CandidateResult
from llmq.files import atomic_path
from llmq.results.record import Environment, Metric, Protocol, ResultRecord, Subject
from llmq.results.store import append_records, read_records
from quality.catalogue import ROWS, Row, Suite
from quality.corpus import LENGTH, Corpus
from quality.exchange import Made


def measured(row: Row, corpus: Corpus, made: Made, result: CandidateResult, environment: Environment) -> ResultRecord:
    """Return the record of one row."""
    metrics = {**result.perplexity.metrics(), **result.divergence.metrics()}
    metrics["quantize_cpu_seconds"] = Metric(value=made.cost.cpu_seconds, unit="s")
    metrics["reference_perplexity"] = Metric(
        value=metrics["perplexity"].value / exp(metrics["delta_ln_perplexity"].value), unit="1"
    )
    protocol = result.divergence.protocol
    reference = {"reference": f"{corpus.name} fp32", "reference_sha256": corpus.checkpoint.sha256, "reference_dtype": "fp32"}
    return ResultRecord(
        kind="divergence",
        subject=_subject(row, corpus, made),
        protocol=protocol.model_copy(update={"params": protocol.params | reference}),
        metrics=metrics,
        environment=environment,
        notes=made.notes,
    )


def refused(row: Row, corpus: Corpus, reason: str, environment: Environment) -> ResultRecord:
    """Return the record of a row that could not be measured."""
    return ResultRecord(
        kind="divergence",
        subject=_subject(row, corpus, None),
        protocol=Protocol(name="none", version=1),
        metrics={},
        environment=environment,
        notes=[f"not measured: {reason}"],
    )


def _subject(row: Row, corpus: Corpus, made: Made | None) -> Subject:
    options: dict[str, Any] = {
        "section": row.section,
        "tool": row.tool,
        "settings": dict(row.settings),
        "calibration": calibration_of(row, corpus),
        "about": row.about,
        "base": row.base,
    }
    if made is not None:
        options |= {"versions": made.versions, "resolved": made.settings}
    return Subject(
        model=corpus.name,
        checkpoint_sha256=corpus.checkpoint.sha256,
        tokenizer_sha256=corpus.tokenizer.sha256,
        scheme=row.name,
        options=options,
        bits_per_weight=None if made is None else made.bits_per_weight,
    )


def calibration_of(row: Row, corpus: Corpus) -> dict[str, Any] | None:
    """Return what a row is calibrated with; None: it is data-free."""
    if row.windows == 0:
        return None
    return {"windows": row.windows, "length": LENGTH, "seed": corpus.suite.seed, "text": corpus.text("train").name}


class RecordFile:
    """The records of one suite on disk."""

    def __init__(self, path: Path, suite: Suite) -> None:
        self.path, self.suite = path, suite
        self.records: dict[str, ResultRecord] = {}
        self.read()

    def read(self) -> None:
        """Take what is on disk."""
        if self.path.exists():
            self.records = {record.subject.scheme: record for record in read_records(self.path)}

    def has(self, row: Row) -> bool:
        """Whether the row was measured as the catalogue has it now."""
        record = self.records.get(row.name)
        return (
            record is not None
            and bool(record.metrics)
            and record.subject.options["settings"] == dict(row.settings)
            and (record.subject.options["calibration"] or {}).get("windows", 0) == row.windows
        )

    def put(self, record: ResultRecord) -> None:
        """Keep a record, and write the file anew: rows in the catalogue's order, without rows that it no longer has.

        Several processes may measure rows of one suite: each adds to what is on disk by then.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.read()
            self.records[record.subject.scheme] = record
            ordered: Sequence[ResultRecord] = [self.records[name] for name in ROWS if name in self.records]
            with atomic_path(self.path, force=True) as temporary:
                append_records(temporary, ordered)
        finally:
            os.close(folder)  # which also gives the lock back
