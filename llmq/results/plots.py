"""The plots of a report, from records: figures against one another, distributions, and what single linears lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import floor, log10

from llmq.results.layer_plots import layer_plots
from llmq.results.pareto import pareto_front
from llmq.results.plot_types import Axis, Curve, Curves, Plot, Point, Scale, Scatter
from llmq.results.record import Histogram, Kind, Metric, ResultRecord
from llmq.results.table import KINDS, Row, joined

WIDE_RANGE = 8.0
"""From this ratio of the largest value to the smallest one on, an axis is logarithmic."""


def plots_of(records: Sequence[ResultRecord]) -> tuple[Plot, ...]:
    """Return every plot that there is something to show in, from records that may be compared."""
    rows, _ = joined([record for record in records if record.kind in KINDS])
    found = (_against_size(rows), _against_speed(rows), _divergences(rows), _roofline(rows), _latencies(rows))
    return (*(plot for plot in found if plot is not None), *layer_plots(records))


def scale_of(values: Sequence[float]) -> Scale:
    """Return the scale on which values can be told from one another: logarithmic over a wide range, with a place for 0."""
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) / min(positive) < WIDE_RANGE:
        return "linear"
    return "log" if len(positive) == len(values) else "symlog"


def decade_below(values: Sequence[float]) -> float:
    """Return the power of ten at or below the least positive value: where a symlog axis turns linear."""
    return float(10.0 ** floor(log10(min(value for value in values if value > 0))))


def _against_size(rows: Sequence[Row]) -> Scatter | None:
    sizes = [None if row.subject.size_bytes is None else float(row.subject.size_bytes) for row in rows]
    large = max((size for size in sizes if size is not None), default=0.0) >= 1e9
    unit, factor = ("GB", 1e-9) if large else ("MB", 1e-6)
    axis = Axis("size of all parameters", unit, factor=factor, better="less")
    return _quality("size", "What the size costs", rows, axis, lambda row: _plain(row.subject.size_bytes))


def _against_speed(rows: Sequence[Row]) -> Scatter | None:
    axis = Axis("decode speed", "tokens/s", better="more")
    return _quality("speed", "What the speed costs", rows, axis, lambda row: row.metric("decode", "tokens_per_s"))


def _plain(value: float | None) -> Metric | None:
    return None if value is None else Metric(value=value, unit="bytes")


def _quality(name: str, title: str, rows: Sequence[Row], x: Axis, x_of: Callable[[Row], Metric | None]) -> Scatter | None:
    """Return divergence against `x`, or perplexity where no divergence was measured."""
    kind, figure, y = _quality_axis(rows)
    both = [(index, row, x_of(row), row.metric(kind, figure)) for index, row in enumerate(rows)]
    known = [(index, row, first, second) for index, row, first, second in both if first is not None and second is not None]
    if len(known) < 2:
        return None
    ways = (x.better == "less", True)
    front = pareto_front([(first.value, second.value) for _, _, first, second in known], minimize=ways)
    points = tuple(
        Point(row.label, index, first.value, second.value, first.stderr, second.stderr, on_front)
        for (index, row, first, second), on_front in zip(known, front, strict=True)
    )
    x, y = replace(x, scale=scale_of([point.x for point in points])), replace(y, scale=scale_of([point.y for point in points]))
    named = ", ".join(point.label for point in points if point.on_front)
    caption = (
        f"{y.quantity} against {x.quantity}; bars are one standard error. On the Pareto front, where no other choice is as good "
        f"in both figures and better in one: {named}. It goes by the figures alone, not by their errors."
    )
    return Scatter(name, title, caption + _missing(rows, [point.label for point in points]), x, y, points)


def _quality_axis(rows: Sequence[Row]) -> tuple[Kind, str, Axis]:
    if any(row.metric("divergence", "kl_mean") for row in rows):
        return "divergence", "kl_mean", Axis("KL from the original", "nats/token", better="less")
    name = "word_perplexity" if any(row.metric("perplexity", "word_perplexity") for row in rows) else "perplexity"
    return "perplexity", name, Axis(name.replace("_", " "), "1", better="less")


def _roofline(rows: Sequence[Row]) -> Scatter | None:
    points, walls = [], set()
    for index, row in enumerate(rows):
        nbytes, achieved = row.metric("decode", "bytes_per_step"), row.metric("decode", "bandwidth_gbps")
        if nbytes is None or achieved is None:
            continue
        share, wall = row.metric("decode", "bandwidth_share"), row.metric("decode", "machine_bandwidth_gbps")
        walls |= {wall.value} if wall is not None else set()
        note = "" if share is None else f"{100 * share.value:.0f} %"
        points.append(Point(row.label, index, nbytes.value, achieved.value, None, achieved.stderr, note=note))
    if not points:
        return None
    large = max(point.x for point in points) >= 1e9
    x = Axis(
        "bytes of one decode step", "GB" if large else "MB", scale_of([point.x for point in points]), 1e-9 if large else 1e-6
    )
    y = Axis("achieved bandwidth", "GB/s", scale_of([*(point.y for point in points), *walls]), better="more")
    caption = "Bytes that a decode step has to read, and how fast they were read; bars are one standard error."
    if walls:
        measured = " and ".join(f"{wall:.3g} GB/s" for wall in sorted(walls))
        caption += (
            f" The machine's bandwidth was measured as {measured}. Percents are of that: a point at the line reads as fast as "
            "memory gives, one above it from caches, or another program slowed the measurement down."
        )
    title = "How near decoding is to the machine's bandwidth"
    return Scatter("roofline", title, caption, x, y, tuple(points), tuple(sorted(walls)))


def _divergences(rows: Sequence[Row]) -> Curves | None:
    curves, exact = [], []
    for index, row in enumerate(rows):
        found = _histogram(row, "divergence", "kl")
        if found is None:
            continue
        median = row.metric("divergence", "kl_median")
        if found.counts:
            curves.append(_curve(row.label, index, found, None if median is None else median.value))
        if found.zeros:
            exact.append(f"{row.label} {found.zeros / found.total:.3%}".replace(".000%", "%").replace("%", " %"))
    if not curves:
        return None
    zeros = f" Tokens whose divergence is exactly 0 have no place on the axis: {', '.join(exact)}." if exact else ""
    caption = "Share of scored tokens by their divergence from the original; the right end is what a mean hides." + zeros
    x, y = Axis("KL of one token", "nats", "log"), Axis("share of tokens", "1", "log")
    return Curves("kl", "Divergence, token by token", caption, x, y, tuple(curves))


def _latencies(rows: Sequence[Row]) -> Curves | None:
    curves = []
    for index, row in enumerate(rows):
        found, tpot = _histogram(row, "decode", "step_s"), row.metric("decode", "tpot_s")
        if found is not None and found.counts:
            curves.append(_curve(row.label, index, found, None if tpot is None else tpot.value))
    if not curves:
        return None
    caption = (
        "Times of all decode steps, each row to its own height. The line in a row is its time per output token (TPOT), a median."
    )
    x, y = Axis("time of a decode step", "ms", "log", 1e3, better="less"), Axis("share of steps", "1")
    return Curves("latency", "Decode steps, one by one", caption, x, y, tuple(curves), stacked=True)


def _histogram(row: Row, kind: Kind, name: str) -> Histogram | None:
    return row.records[kind].details.histograms.get(name) if kind in row.records else None


def _curve(label: str, series: int, found: Histogram, mark: float | None) -> Curve:
    shares = tuple(count / found.total for count in found.counts)
    return Curve(label, series, tuple(found.edges), shares, found.total, mark)


def _missing(rows: Sequence[Row], shown: Sequence[str]) -> str:
    absent = [row.label for row in rows if row.label not in shown]
    return f" Not measured in both: {', '.join(absent)}." if absent else ""
