"""The table of a matrix: seeds of one cell joined, errors paired with the reference token by token, and the Pareto fronts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from numpy.typing import NDArray

from llmq.api.matrix_recipe import CALIBRATION, SEED
from llmq.evaluation.estimates import batch_means
from llmq.results import figures
from llmq.results.pareto import pareto_front
from llmq.results.record import Kind, ResultRecord, Subject
from llmq.results.table import Cell, Column, Table, comparison_table, subject_label
from llmq.results.tokens import TokenFigures


@dataclass(frozen=True, slots=True)
class SeededFigure:
    """A figure of all seeds of a cell.

    Attributes:
        value: mean over the seeds.
        stderr: one standard error that the evaluated text leaves; paired with the reference where it is a difference from it.
        spread: standard deviation between the seeds; None where there is one seed.
    """

    value: float
    stderr: float | None
    spread: float | None


@dataclass(frozen=True)
class MatrixRow:
    """The seeds of one cell.

    Attributes:
        label: the scheme, and what tells its options from those of other rows.
        subject: of all seeds, without the seed.
        seeds: in the recipe's order; empty where nothing depends on one.
        metrics: by name: ln_perplexity, delta_ln_perplexity, kl_mean, top1_agreement, prefill_tokens_per_s and
            decode_tokens_per_s, those that were measured.
        fronts: 'size' and 'speed', where the row is on the Pareto front of the divergence and that.
    """

    label: str
    subject: Subject
    seeds: tuple[int, ...]
    metrics: dict[str, SeededFigure]
    fronts: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        options = dict(self.subject.options)
        return {
            "label": self.label,
            "scheme": self.subject.scheme,
            "calibration": options.pop(CALIBRATION, None),
            "options": options,
            "seeds": list(self.seeds),
            "bits_per_weight": self.subject.bits_per_weight,
            "size_bytes": self.subject.size_bytes,
            "metrics": {name: asdict(figure) for name, figure in self.metrics.items()},
            "pareto": self.fronts,
        }


def matrix_rows(records: Sequence[ResultRecord], reference: str) -> list[MatrixRow]:
    """Join the seeds of each cell, and mark the fronts.

    Args:
        records: of all cells, in their order, with their token figures; the cell of the reference among them.
        reference: scheme of that cell.
    """
    groups: dict[str, list[ResultRecord]] = {}
    for record in records:
        without = _without_seed(record.subject)
        groups.setdefault(json.dumps([without.scheme, without.options], sort_keys=True), []).append(record)
    subjects = [_without_seed(found[0].subject) for found in groups.values()]
    baseline = next(
        record.tokens for record in records if record.kind == "divergence" and _is_reference(record.subject, reference)
    )
    rows = [
        MatrixRow(subject_label(subject, subjects), subject, _seeds(found), _metrics(found, baseline))
        for subject, found in zip(subjects, groups.values(), strict=True)
    ]
    _mark(rows, "size", lambda row: None if row.subject.size_bytes is None else float(row.subject.size_bytes), less=True)
    _mark(rows, "speed", lambda row: row.metrics["decode_tokens_per_s"].value if _benched(row) else None, less=False)
    return rows


def matrix_table(rows: Sequence[MatrixRow], records: Sequence[ResultRecord]) -> Table:
    """Lay the rows out; what the rows have in common, and the notes of the records, as in the table of `llmq compare`."""
    common = comparison_table(records)
    cells = [_cells(row) for row in rows]
    headings = [heading for heading in cells[0] if any(each[heading].text not in (figures.ABSENT, "") for each in cells)]
    header = {key: value for key, value in common.header.items() if key not in ("kernels", "±")}
    header["±"] = "one standard error, of the text; differences from the reference are paired token by token"
    notes = [
        "Pareto: no other row is both closer to the original (KL) and smaller (size), or faster in decode (speed); figures count "
        "as they stand, whatever their errors."
    ]
    if any(len(row.seeds) > 1 for row in rows):
        notes.insert(0, "figures are means over the seeds; 'seeds' is the standard deviation between them.")
    if any(_benched(row) for row in rows):
        notes.append("speed was measured one cell after another, not in turns.")
    seeded = len({json.dumps([r.subject.scheme, r.subject.options], sort_keys=True) for r in records})
    return Table(
        title=f"{rows[0].subject.model}: {seeded} cells in {len(rows)} rows",
        header=header,
        columns=tuple(Column(heading, right=heading not in ("scheme", "Pareto")) for heading in headings),
        rows=tuple(tuple(each[heading].text for heading in headings) for each in cells),
        notes=(*notes, *common.notes),
        cells=tuple(tuple(each[heading] for heading in headings) for each in cells),
    )


def _without_seed(subject: Subject) -> Subject:
    return subject.model_copy(update={"options": {name: value for name, value in subject.options.items() if name != SEED}})


def _is_reference(subject: Subject, reference: str) -> bool:
    return subject.scheme == reference and not subject.options


def _seeds(records: Sequence[ResultRecord]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(record.subject.options[SEED] for record in records if SEED in record.subject.options))


def _metrics(records: Sequence[ResultRecord], baseline: TokenFigures) -> dict[str, SeededFigure]:
    found: dict[str, SeededFigure] = {}
    quality = [record for record in records if record.kind == "divergence"]
    nll = [record.tokens.nll for record in quality]
    found["ln_perplexity"] = _tokenwise(nll, baseline)
    found["delta_ln_perplexity"] = _tokenwise([each.astype("f8") - baseline.nll for each in nll], baseline)
    found["kl_mean"] = _tokenwise([record.tokens.kl for record in quality], baseline)
    found["top1_agreement"] = _tokenwise([record.tokens.same_top for record in quality], baseline)
    for kind in ("prefill", "decode"):
        _speed(records, kind, found)
    return found


def _tokenwise(seeds: Sequence[NDArray[Any]], baseline: TokenFigures) -> SeededFigure:
    """Average a figure of each token over the seeds; its error is that of batch means over the text's windows."""
    values = torch.stack([torch.from_numpy(each.astype("f8")) for each in seeds])
    estimate = batch_means(values.mean(0), torch.from_numpy(baseline.window_sizes))
    means = [float(each.mean()) for each in values]
    return SeededFigure(estimate.value, estimate.stderr, stdev(means) if len(means) > 1 else None)


def _speed(records: Sequence[ResultRecord], kind: Kind, found: dict[str, SeededFigure]) -> None:
    metrics = [record.metrics["tokens_per_s"] for record in records if record.kind == kind]
    if metrics:
        values = [metric.value for metric in metrics]
        errors = [metric.stderr for metric in metrics if metric.stderr is not None]
        # the seeds were timed apart, so their errors are independent
        stderr = sum(error**2 for error in errors) ** 0.5 / len(metrics) if len(errors) == len(metrics) else None
        found[f"{kind}_tokens_per_s"] = SeededFigure(fmean(values), stderr, stdev(values) if len(values) > 1 else None)


def _benched(row: MatrixRow) -> bool:
    return "decode_tokens_per_s" in row.metrics


def _mark(rows: Sequence[MatrixRow], name: str, cost: Callable[[MatrixRow], float | None], *, less: bool) -> None:
    """Mark the rows on the front of their mean divergence and a cost, of which `less` or more is better."""
    measured = [(row, found) for row in rows if (found := cost(row)) is not None]
    points = [(row.metrics["kl_mean"].value, found) for row, found in measured]
    for (row, _), on_front in zip(measured, pareto_front(points, minimize=(True, less)), strict=True):
        if on_front:
            row.fronts.append(name)


def _cells(row: MatrixRow) -> dict[str, Cell]:
    perplexity = row.metrics["ln_perplexity"].value
    ppl = float(torch.tensor(perplexity, dtype=torch.float64).exp())
    bits, nbytes = row.subject.bits_per_weight, row.subject.size_bytes
    return {
        "scheme": Cell(row.label),
        "n": Cell(str(len(row.seeds)) if row.seeds else ""),
        "perplexity": Cell(figures.plain(ppl), ppl),
        "Δ ln ppl": _figure(row, "delta_ln_perplexity"),
        "seeds, Δ": _spread(row, "delta_ln_perplexity"),
        "KL (nats/token)": _figure(row, "kl_mean"),
        "seeds, KL": _spread(row, "kl_mean"),
        "same top-1": _figure(row, "top1_agreement", percent=True),
        "prefill tok/s": _figure(row, "prefill_tokens_per_s"),
        "decode tok/s": _figure(row, "decode_tokens_per_s"),
        "bits/weight": Cell(figures.ABSENT if bits is None else f"{bits:.2f}", bits),
        "size": Cell(figures.ABSENT) if nbytes is None else Cell(figures.size(nbytes), float(nbytes)),
        "Pareto": Cell(", ".join(row.fronts)),
    }


def _figure(row: MatrixRow, name: str, *, percent: bool = False) -> Cell:
    found = row.metrics.get(name)
    if found is None:
        return Cell(figures.ABSENT)
    factor, unit = (100.0, " %") if percent else (1.0, "")
    return Cell(figures.with_error(found.value, found.stderr, factor=factor, unit=unit), found.value, found.stderr, factor)


def _spread(row: MatrixRow, name: str) -> Cell:
    spread = row.metrics[name].spread
    return Cell(figures.ABSENT) if spread is None else Cell(f"± {figures.plain(spread, 2)}", spread)
