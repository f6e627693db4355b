"""A metric over time: which records may share an axis, and their picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from llmq.errors import UsageError, suggest
from llmq.files import atomic_path
from llmq.results.palette import series_colour, series_marker
from llmq.results.record import Metric, ResultRecord, Subject
from llmq.results.table import subject_label

MAX_PANELS = 6
SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Series:
    """One scheme with its options: a figure at each moment, oldest first."""

    label: str
    points: list[tuple[datetime, Metric]]


@dataclass(frozen=True)
class Panel:
    """The series that may be compared: one model, protocol and machine.

    Attributes:
        title: what they have in common.
        unit: of the metric.
        series: by scheme.
    """

    title: str
    unit: str
    series: list[Series] = field(default_factory=list)


def timeline(records: Sequence[ResultRecord], metric: str) -> list[Panel]:
    """Sort the figures of a metric into panels of what may be compared, and series of schemes.

    Versions of llmq and of its libraries may differ within a series: their effect is what a history is looked at for.

    Raises:
        UsageError: no record has the metric, records of several kinds have it, or there are more than `MAX_PANELS` panels.
    """
    chosen = _with_metric(records, metric)
    name = metric.rpartition(".")[2]
    groups: dict[str, list[ResultRecord]] = {}
    for record in sorted(chosen, key=lambda record: record.created_at):
        groups.setdefault(json.dumps(_circumstances(record), sort_keys=True), []).append(record)
    if len(groups) > MAX_PANELS:
        raise UsageError(
            f"{metric} was measured in {len(groups)} ways that cannot share an axis (models, protocols, machines), and at most "
            f"{MAX_PANELS} are drawn; choose with --model, --scheme or --kind."
        )
    common = [_circumstances(found[0]) for found in groups.values()]
    panels = []
    for circumstances, found in zip(common, groups.values(), strict=True):
        panel = Panel(_title(circumstances, common), found[0].metrics[name].unit)
        subjects = [record.subject for record in found]
        for label, alike in _by_scheme(found, subjects).items():
            panel.series.append(Series(label, [(record.created_at, record.metrics[name]) for record in alike]))
        panels.append(panel)
    return panels


def draw(panels: Sequence[Panel], metric: str, out: Path, *, force: bool = False) -> None:
    """Draw panels below one another, with a bar of one standard error on each figure that has one.

    Raises:
        UsageError: `out` is neither PNG nor SVG.
        OutputError: it exists and `force` is not set, or it cannot be written.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"a plot is written as {' or '.join(SUFFIXES)}; got {out.name}.")
    figure = Figure(figsize=(9, 1 + 3.2 * len(panels)), layout="constrained")
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0], panels, strict=True):
        for series in panel.series:
            look = labels.index(series.label)  # of one scheme the same in all panels
            moments = [moment for moment, _ in series.points]
            values = [each.value for _, each in series.points]
            errors = [each.stderr or 0.0 for _, each in series.points]
            style = {"color": series_colour(look), "marker": series_marker(look), "markersize": 5, "linewidth": 1, "capsize": 3}
            axes.errorbar(moments, values, yerr=errors, label=series.label, **style)
        locator = AutoDateLocator()  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        axes.set_title(panel.title, fontsize=9, wrap=True)
        axes.set_ylabel(metric if panel.unit == "1" else f"{metric} ({panel.unit})")
        axes.grid(visible=True, alpha=0.3)
        axes.tick_params(labelbottom=True)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    moments = [moment for panel in panels for series in panel.series for moment, _ in series.points]
    if min(moments) == max(moments):  # or the axis would show years
        axes.set_xlim(min(moments) - timedelta(hours=12), max(moments) + timedelta(hours=12))
    with atomic_path(out, force=force) as temporary, temporary.open("wb") as file:
        figure.savefig(file, format=out.suffix[1:], dpi=150)


def _with_metric(records: Sequence[ResultRecord], metric: str) -> list[ResultRecord]:
    kind, _, name = metric.rpartition(".")
    chosen = [record for record in records if name in record.metrics and kind in ("", record.kind)]
    if not chosen:
        known = sorted({f"{record.kind}.{each}" for record in records for each in record.metrics})
        if not known:
            raise UsageError(f"history has no records to draw {metric} of; measure something, or ask for less.")
        raise UsageError(f"no record in history has the metric {metric!r}.{suggest(metric, known)}")
    kinds = sorted({record.kind for record in chosen})
    if len(kinds) > 1:
        names = ", ".join(f"{each}.{name}" for each in kinds)
        raise UsageError(f"{metric} is measured by several kinds of records; name one: {names}.")
    return chosen


def _circumstances(record: ResultRecord) -> dict[str, Any]:
    """Return what must agree between figures that share an axis, by name."""
    here, subject = record.environment, record.subject
    return {
        "model": subject.model,
        "checkpoint": subject.checkpoint_sha256[:12],
        "protocol": f"{record.protocol.name} v{record.protocol.version}",
        **record.protocol.params,
        "cpu": here.cpu,
        "device": here.device,
        "threads": here.threads,
    }


def _title(circumstances: dict[str, Any], every: Sequence[dict[str, Any]]) -> str:
    """Return the model, the protocol and the machine, and in what else this panel differs from others."""
    shown = ["model", "protocol", "cpu", "threads"]
    shown += [name for name in circumstances if name not in shown and any(circumstances[name] != one.get(name) for one in every)]
    return ", ".join(f"{name} {circumstances[name]}" if name not in shown[:3] else str(circumstances[name]) for name in shown)


def _by_scheme(records: Sequence[ResultRecord], subjects: Sequence[Subject]) -> dict[str, list[ResultRecord]]:
    found: dict[str, list[ResultRecord]] = {}
    for record in records:
        found.setdefault(subject_label(record.subject, subjects), []).append(record)
    return found
