"""Tables of records of kind 'layers': what each quantized linear costs, by block and kind, and which overrides are worth it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from llmq.errors import UsageError
from llmq.results import figures
from llmq.results.markdown import to_markdown
from llmq.results.record import Metric, ResultRecord
from llmq.results.table import Column, Table

Order = Literal["worst", "layer"]
ORDERS: tuple[Order, ...] = ("worst", "layer")
SHOWN = 20
"""Linears that are named one by one where the worst come first."""
SCALE = 1e3
"""Costs are written in thousandths of a nat per token."""
UNIT = "10⁻³ nats/token"

_BLOCK = re.compile(r"(.*\.)?([0-9]+)\.(.+)")
_PICK = re.compile(r"pick ([0-9]+): (.*)")


def order_of(name: str) -> Order:
    """Return the order of an option's value; raises UsageError for one that there is not."""
    for known in ORDERS:
        if known == name:
            return known
    raise UsageError(f"--sort is {' or '.join(ORDERS)}, got {name!r}.")


def check_layers(record: ResultRecord) -> ResultRecord:
    """Return the record; raises UsageError when it is of another kind."""
    if record.kind != "layers":
        raise UsageError(
            f"a record of kind {record.kind} says nothing of single linears; `llmq eval layers --record` writes some."
        )
    return record


def block_table(record: ResultRecord, order: Order = "worst") -> Table:
    """Lay out what linears cost: a row for each block, a column for each kind of projection, and their sums."""
    layers = check_layers(record).details.layers
    kinds = list(dict.fromkeys(place_of(fqn)[1] for fqn in layers))
    costs: dict[str, dict[str, float]] = {}
    for fqn, found in layers.items():
        block, kind = place_of(fqn)
        costs.setdefault(block, {})[kind] = found["cost_kl"].value
    rows = sorted(costs.items(), key=lambda row: -sum(row[1].values())) if order == "worst" else list(costs.items())
    columns = [("block", False), *((kind, True) for kind in kinds), ("all", True)]
    cells = [[block, *(_thousandths(own.get(kind)) for kind in kinds), _thousandths(sum(own.values()))] for block, own in rows]
    sums = [[own[kind] for own in costs.values() if kind in own] for kind in kinds]
    cells.append(["all", *(_thousandths(sum(each)) for each in sums), _thousandths(sum(map(sum, sums)))])
    title = f"KL that each linear costs, by block and kind ({UNIT})"
    return _table(title, columns, cells)


def linear_table(record: ResultRecord, order: Order = "worst") -> Table:
    """Lay out every figure of the linears, the worst first, or all of them in the model's order."""
    layers = check_layers(record).details.layers
    names = list(layers)
    if order == "worst":
        names = sorted(names, key=lambda fqn: -layers[fqn]["cost_kl"].value)[:SHOWN]
    rounds, alone = (_any(layers.values(), name) for name in ("input_error", "alone_kl"))
    columns = [("linear", False), ("SQNR (dB)", True), ("error of outputs", True), ("KL cost", True), ("Δ ln ppl", True)]
    columns += [("KL alone", True), ("Δ ln ppl alone", True)] if alone else []
    cells = []
    for fqn in names:
        found = layers[fqn]
        error = found["weight_error"].value
        shown = f"{figures.plain(100 * error, 2)} %"
        if rounds:
            shown += f" + {figures.plain(100 * found['input_error'].value, 2)} %" if "input_error" in found else " + 0 %"
        row = [fqn, f"{found['sqnr'].value:.1f}" if "sqnr" in found else figures.ABSENT, shown]
        row += [_with_error(found["cost_kl"]), _with_error(found["cost_ln_perplexity"])]
        cells.append([*row, _with_error(found["alone_kl"]), _with_error(found["alone_ln_perplexity"])] if alone else row)
    left = len(layers) - len(names)
    notes = [f"{left} more that cost less"] if left else []
    if rounds:
        notes.append("error of outputs: from the weight + from rounding the inputs")
    return _table(f"What the linears cost ({UNIT})", columns, cells, notes)


def pick_table(record: ResultRecord) -> Table | None:
    """Lay out the recommended overrides, the best first; None where there are none."""
    layers = check_layers(record).details.layers
    picked = sorted((found for found in layers.values() if "pick" in found), key=lambda found: found["pick"].value)
    if not picked:
        return None
    arguments = {match[1]: match[2] for note in record.notes if (match := _PICK.fullmatch(note))}
    columns = [("paste", False), ("KL", True), ("of all", True), ("ln ppl", True), ("bytes", True), ("of the size", True)]
    columns.append(("error left", True))
    whole = record.metrics["kl_mean"].value
    cells = []
    for found in picked:
        nbytes, share = found["pick_bytes"].value, found["pick_size_share"].value
        cells.append(
            [
                arguments[str(int(found["pick"].value))],
                _gain(found["pick_kl"]),
                f"{-100 * found['pick_kl'].value / whole:.1f} %" if whole > 0 else figures.ABSENT,
                _gain(found["pick_ln_perplexity"]),
                f"{'+' if nbytes >= 0 else '-'}{figures.size(abs(nbytes))}",
                f"{100 * share:+.2f} %",
                f"{100 * found['pick_error_left'].value:.0f} %",
            ]
        )
    return _table(f"Overrides that buy most for their bytes ({UNIT}; predicted, one by one)", columns, cells)


def verification_table(record: ResultRecord) -> Table | None:
    """Lay out what all recommended overrides together are predicted to change, and what they do; None where there are none."""
    metrics = check_layers(record).metrics
    if "predicted_kl" not in metrics:
        return None
    named = {
        "predicted: the sum": "predicted",
        "measured on the same windows": "measured",
        "measured on further windows, not chosen by": "fresh",
    }
    columns = [("all of them together", False), ("KL", True), ("ln ppl", True)]
    cells = [
        [words, _gain(metrics[f"{name}_kl"]), _gain(metrics[f"{name}_ln_perplexity"])]
        for words, name in named.items()
        if f"{name}_kl" in metrics
    ]
    nbytes = metrics["picks_bytes"].value
    size = record.subject.size_bytes
    share = f", {100 * nbytes / size:+.2f} % of the size" if size else ""
    sign = "+" if nbytes >= 0 else "-"
    return _table(f"Predicted and measured ({UNIT}; {sign}{figures.size(abs(nbytes))}{share})", columns, cells)


def layers_section(record: ResultRecord) -> str:
    """Return a record as Markdown: what was measured, and all tables."""
    params, metrics = check_layers(record).protocol.params, record.metrics
    kl, ln_ppl = metrics["kl_mean"], metrics["delta_ln_perplexity"]
    parts = [
        f"**{record.subject.model}, {record.subject.scheme}** against {params['reference']}, on {params['n_windows']:,} windows "
        f"of {params['length']:,} tokens of {params['text']}: KL {figures.with_error(kl.value, kl.stderr)}, Δ ln ppl "
        f"{figures.with_error(ln_ppl.value, ln_ppl.stderr)} nats per token. ± is one standard error."
    ]
    for content in (block_table(record), linear_table(record), pick_table(record), verification_table(record)):
        if content is not None:
            parts += [f"{content.title}:", to_markdown(content)]
    return "\n\n".join(parts)


def notes_of(record: ResultRecord) -> list[str]:
    """Return the notes that are not a recommendation's text."""
    return [note for note in record.notes if not _PICK.fullmatch(note)]


def place_of(fqn: str) -> tuple[str, str]:
    """Return the number of a linear's block and its kind: '3' and 'down'; what is in no block is a kind of its own."""
    match = _BLOCK.fullmatch(fqn)
    return (match[2], match[3].rpartition(".")[2].removesuffix("_proj")) if match else (figures.ABSENT, fqn)


def _any(rows: Iterable[Mapping[str, Metric]], name: str) -> bool:
    return any(name in row for row in rows)


def _thousandths(value: float | None) -> str:
    return "" if value is None else f"{SCALE * value + 0.0:.2f}"


def _with_error(metric: Metric) -> str:
    if metric.stderr is None:
        return f"{SCALE * metric.value:.3f}"
    return figures.with_error(metric.value, metric.stderr, factor=SCALE)


def _gain(metric: Metric) -> str:
    """Write a gain as what it changes: a loss that falls has a minus."""
    return _with_error(metric.model_copy(update={"value": -metric.value}))


def _table(title: str, columns: Sequence[tuple[str, bool]], cells: list[list[str]], notes: Sequence[str] = ()) -> Table:
    return Table(
        title=title,
        header={},
        columns=tuple(Column(heading, right=right) for heading, right in columns),
        rows=tuple(map(tuple, cells)),
        notes=tuple(notes),
    )
