"""Tables of whatever records a run has: the comparison table where they may share it, else the figures of each kind."""

from __future__ import annotations

from collections.abc import Sequence

from llmq.errors import UsageError
from llmq.results import figures
from llmq.results.record import Metric, ResultRecord
from llmq.results.table import KINDS, Column, Table, check_comparable, comparison_table, subject_label

_MOST_COLUMNS = 4
"""Records that stand beside one another; more stand below one another, a line each."""


def tables_of(records: Sequence[ResultRecord]) -> list[Table]:
    """Return the comparison table of all records that belong into one, and a table of the figures of each other kind."""
    compared = [record for record in records if record.kind in KINDS]
    try:
        check_comparable(compared)
        tables = [comparison_table(compared)] if compared else []
    except UsageError:  # several protocols, as of a benchmark of several batch sizes: nothing to compare
        tables, compared = [], []
    rest = [record for record in records if record not in compared]
    for kind in dict.fromkeys(record.kind for record in rest):
        tables.append(_figures_of([record for record in rest if record.kind == kind]))
    return tables


def _figures_of(records: Sequence[ResultRecord]) -> Table:
    """Return every metric of records of one kind, named by what tells them apart."""
    labels = _labels(records)
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    cells = [[_cell(record.metrics.get(name)) for name in names] for record in records]
    if len(records) <= _MOST_COLUMNS:
        columns = ["metric", *labels]
        rows = [[name, *(row[index] for row in cells)] for index, name in enumerate(names)]
    else:
        columns = ["record", *names]
        rows = [[label, *row] for label, row in zip(labels, cells, strict=True)]
    subject = records[0].subject
    return Table(
        title=f"{records[0].kind}: {subject.model}",
        header={"protocol": _protocol(records), "±": "one standard error"},
        columns=tuple(Column(heading, right=index > 0) for index, heading in enumerate(columns)),
        rows=tuple(map(tuple, rows)),
        notes=tuple(dict.fromkeys(note for record in records for note in record.notes)),
    )


def _labels(records: Sequence[ResultRecord]) -> list[str]:
    """Return scheme, and those parameters of the protocol (and the model) in which the records differ."""
    subjects = [record.subject for record in records]
    every = [{"model": record.subject.model, **record.protocol.params} for record in records]
    differing = [
        name for name in dict.fromkeys(name for each in every for name in each) if len({str(e.get(name)) for e in every}) > 1
    ]
    labels = []
    for record, own in zip(records, every, strict=True):
        more = [f"{name}={own[name]}" for name in differing if name in own and not isinstance(own[name], list | dict)]
        kernels = list(record.kernels) if record.kind == "kernel" else []
        labels.append(" ".join([subject_label(record.subject, subjects), *kernels, *more]))
    return labels


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return figures.ABSENT
    if metric.unit == "bytes":
        return figures.size(metric.value)
    return figures.with_error(metric.value, metric.stderr, unit="" if metric.unit == "1" else f" {metric.unit}")


def _protocol(records: Sequence[ResultRecord]) -> str:
    """Return the protocol and those of its parameters that all records share."""
    protocol = records[0].protocol
    shared = {
        name: value
        for name, value in protocol.params.items()
        if all(record.protocol.params.get(name) == value for record in records) and not isinstance(value, list | dict)
    }
    return "; ".join([f"{protocol.name} v{protocol.version}", *(f"{k} {v}" for k, v in shared.items() if v is not None)])
