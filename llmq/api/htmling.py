"""Reports as pages and plots: one HTML file, or plots in files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmq.errors import UsageError, suggest
from llmq.files import atomic_path, check_absent
from llmq.progress import SILENT, Progress
from llmq.results.drawing_svg import to_png, to_svg
from llmq.results.groups import comparable_groups
from llmq.results.page import render_page
from llmq.results.plot_types import Plot
from llmq.results.plots import plots_of
from llmq.results.run import Run


def write_html(runs: Sequence[Run], out: Path, *, force: bool, progress: Progress = SILENT) -> None:
    """Write one page of runs that needs no other file and no network; runs that must not be compared get sections of their own.

    Raises:
        OutputError: `out` exists and `force` is not given, or it cannot be written.
        UsageError: there is no record.
    """
    check_absent(out, force=force)
    page = render_page(runs, progress=progress)
    with atomic_path(out, force=force) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_plots(
    runs: Sequence[Run], out: Path, which: Sequence[str] = (), *, force: bool, progress: Progress = SILENT
) -> list[Path]:
    """Write the plots of a report, the very same as on the page.

    Args:
        runs: whose records are drawn.
        out: a file .png or .svg for one plot; else a folder, in which every plot is written as both.
        which: names of plots; none: all that there are.
        force: replace files that are there.
        progress: hears of each plot.

    Returns:
        The files. Where records must not be compared, each group has files of its own, with its number before the name.

    Raises:
        OutputError: a file exists and `force` is not given, or cannot be written.
        UsageError: there is no such plot, or there are several for one file.
    """
    chosen = _chosen(runs, which)
    as_file = out.suffix.lower() in (".png", ".svg")
    if as_file and len(chosen) != 1:
        raise UsageError(
            f"{out.name} holds one plot, and there are {len(chosen)}: {', '.join(chosen)}; "
            "name one of them with --which, or a folder as the output."
        )
    targets: list[tuple[Path, Plot]] = []
    for name, plot in chosen.items():
        targets += [(out, plot)] if as_file else [(out / f"{name}{suffix}", plot) for suffix in (".svg", ".png")]
    for path, _ in targets:
        check_absent(path, force=force)
    drawn: list[tuple[Path, bytes]] = []
    with progress.task("drawing plots", len(targets)) as advance:
        for path, plot in targets:
            drawn.append((path, to_png(plot) if path.suffix.lower() == ".png" else to_svg(plot).encode()))
            advance(1)
    for path, data in drawn:
        with atomic_path(path, force=force) as temporary:
            temporary.write_bytes(data)
    return [path for path, _ in drawn]


def _chosen(runs: Sequence[Run], which: Sequence[str]) -> dict[str, Plot]:
    """Return the plots by the names of their files."""
    groups = comparable_groups(runs)
    found: dict[str, Plot] = {}
    for number, group in enumerate(groups, start=1):
        found |= {plot.name if len(groups) == 1 else f"{number}-{plot.name}": plot for plot in plots_of(group.records)}
    if not found:
        names = ", ".join(run.name for run in runs)
        raise UsageError(f"there is nothing to plot in {names}; plots are made of what `llmq compare --record` measures.")
    known = {name for file, plot in found.items() for name in (file, plot.name)}
    for name in which:
        if name not in known:
            raise UsageError(f"there is no plot {name!r} of these records.{suggest(name, list(known))}")
    return {file: plot for file, plot in found.items() if not which or file in which or plot.name in which}
