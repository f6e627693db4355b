"""A metric of past runs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmq.api.history import RunFilter, opened_history
from llmq.files import check_absent
from llmq.results.timeline import Panel, draw, timeline


def plot_history(metric: str, schemes: Sequence[str], asked: RunFilter, out: Path, *, force: bool = False) -> list[Panel]:
    """Draw a metric of all runs over time, a line a scheme, with error bars, and return what was drawn.

    Args:
        metric: NAME or KIND.NAME, such as `kl_mean` or `decode.tokens_per_s`.
        schemes: only these; empty: all.
        asked: which runs.
        out: a .png or .svg file.
        force: replace it.

    Raises:
        UsageError: no record has this metric, or the kind of file is unknown.
        OutputError: `out` exists and `force` is not set, or it cannot be written.
    """
    check_absent(out, force=force)
    with opened_history() as history:
        runs = [history.load(stored) for stored in history.runs(model=asked.model, kind=asked.kind)]
    records = [
        record
        for run in runs
        for record in run.records
        if (not schemes or record.subject.scheme in schemes)
        and asked.model in (None, record.subject.model)
        and asked.kind in (None, record.kind)
    ]
    panels = timeline(records, metric)
    draw(panels, metric, out, force=force)
    return panels
