"""Drawing plots with matplotlib. Artists that stand for a figure of a record have an id, by which `drawing_svg` finds them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import ceil, floor, log10, nan, sqrt
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from llmq.results.drawing_heat import draw_heat_maps
from llmq.results.palette import LIGHT, series_colour, series_marker
from llmq.results.plot_types import Axis, Curve, Curves, HeatMaps, Plot, Scatter
from llmq.results.plots import decade_below

WIDTH_IN, HEIGHT_IN = 6.4, 4.0
"""Of a plot without its legend."""
LEGEND_ROW_IN = 0.21
_STYLE: Mapping[Any, object] = {
    "svg.hashsalt": "llmq",  # the same plot has the same ids, whoever draws it
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold a $
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 10.0,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "figure.facecolor": LIGHT["paper"],
    "savefig.facecolor": LIGHT["paper"],
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save as all plots are, whatever the user's matplotlib is set to.

    Characters that the font lacks become boxes, and nobody is warned of them.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def draw(plot: Plot) -> Figure:
    """Return a figure of the plot; call within `style`, and save within it."""
    if isinstance(plot, HeatMaps):
        return draw_heat_maps(plot)
    if isinstance(plot, Scatter):
        return _draw_scatter(plot)
    return _draw_stacked(plot) if plot.stacked else _draw_curves(plot)


def _draw_scatter(plot: Scatter) -> Figure:
    figure = Figure((WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(plot.title)
    fx, fy = plot.x.factor, plot.y.factor
    _scale(axes, "x", plot.x, [value * fx for point in plot.points for value in _reach(point.x, point.x_error, plot.x)])
    ys = [value for point in plot.points for value in _reach(point.y, point.y_error, plot.y)]
    _scale(axes, "y", plot.y, [value * fy for value in [*ys, *plot.walls]])
    handles = []
    if len(plot.front) > 1:
        along = "post" if plot.x.better == "less" else "pre"
        steps = [[point.x * fx for point in plot.front], [point.y * fy for point in plot.front]]
        handles += axes.plot(*steps, color=LIGHT["muted"], lw=1.0, ls=(0, (2, 2)), drawstyle=f"steps-{along}", gid="front")
        handles[0].set_label("Pareto front")
    for index, wall in enumerate(plot.walls):
        line = axes.axhline(wall * fy, color=LIGHT["ink"], lw=1.4, gid=f"wall-{index}", label="the machine, as measured")
        handles += [line] if index == 0 else []
    for index, point in enumerate(plot.points):
        colour = series_colour(point.series)
        axes.errorbar(
            [point.x * fx],
            [point.y * fy],
            xerr=None if not point.x_error else [point.x_error * fx],
            yerr=None if not point.y_error else [point.y_error * fy],
            ecolor=colour,
            elinewidth=1.2,
            capsize=2.5,
            fmt="none",
        )
        (mark,) = axes.plot(
            [point.x * fx], [point.y * fy], gid=f"point-{index}", **_mark(point.series, filled=point.on_front is not False)
        )
        mark.set_label(point.label + (f", {point.note}" if point.note else ""))
        handles.append(mark)
    _legend(figure, handles)
    return figure


def _reach(value: float, error: float | None, axis: Axis) -> list[float]:
    """Return how far the bar of an error reaches; a logarithmic axis has no room for one that is as large as its value."""
    ends = [value, value - (error or 0.0), value + (error or 0.0)]
    return ends if axis.scale == "linear" else [end for end in ends if end >= value or end > value / 4]


def _mark(series: int, *, filled: bool = True) -> dict[str, Any]:
    """Return how a point is drawn; a point off the front is hollow."""
    colour = series_colour(series)
    return {
        "ls": "none",
        "marker": series_marker(series),
        "ms": 7.5,
        "mec": colour,
        "mew": 1.6,
        "mfc": colour if filled else LIGHT["paper"],
        "zorder": 3,
    }


def _draw_curves(plot: Curves) -> Figure:
    figure = Figure((WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(plot.title)
    edges = [edge * plot.x.factor for curve in plot.curves for edge in curve.edges]
    _scale(axes, "x", plot.x, edges)
    _scale(axes, "y", plot.y, [share for curve in plot.curves for share in curve.shares if share > 0])
    handles = []
    for index, curve in enumerate(plot.curves):
        centres = [sqrt(low * high) * plot.x.factor for low, high in pairwise(curve.edges)]
        shares = [share or nan for share in curve.shares]  # an empty bin is a gap: a logarithmic axis has no 0
        mark = {**_mark(curve.series), "ls": "-", "lw": 1.4, "ms": 4.0, "mew": 0.0}
        handles += axes.plot(centres, shares, color=series_colour(curve.series), gid=f"curve-{index}", label=curve.label, **mark)
    _legend(figure, handles)
    return figure


def _draw_stacked(plot: Curves) -> Figure:
    """Draw one distribution below the other, on one axis of values; names stand above them, where they cover nothing."""
    figure = Figure((WIDTH_IN, 0.95 + 0.72 * len(plot.curves)), layout=ConstrainedLayoutEngine(hspace=0.0, h_pad=0.02))
    all_axes = figure.subplots(len(plot.curves), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(plot.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    edges = [edge * plot.x.factor for curve in plot.curves for edge in curve.edges]
    for index, (axes, curve) in enumerate(zip(all_axes, plot.curves, strict=True)):
        last, colour = index == len(plot.curves) - 1, series_colour(curve.series)
        xs, ys = _outline(curve, plot.x.factor)
        axes.fill_between(xs, ys, color=colour, alpha=0.3, lw=0)
        axes.plot(xs, ys, color=colour, lw=1.2, gid=f"curve-{index}")
        if curve.mark is not None:
            axes.axvline(curve.mark * plot.x.factor, color=LIGHT["ink"], lw=1.2, gid=f"mark-{index}")
        axes.set_title(curve.label, fontsize=9, fontweight="normal", pad=1)
        axes.set_ylim(0, 1.05 * max(curve.shares))
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="x", length=3.5 if last else 0)
        _scale(axes, "x", plot.x, edges, named=last)
    return figure


def _outline(curve: Curve, factor: float) -> tuple[list[float], list[float]]:
    """Return the corners of a histogram's steps."""
    xs = [edge * factor for edge in curve.edges for _ in range(2)]
    return xs, [0.0, *(share for share in curve.shares for _ in range(2)), 0.0]


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Put a legend below the axes, where it covers nothing."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), 3 if longest <= 18 else 2 if longest <= 36 else 1)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW_IN * ceil(len(handles) / columns))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, columnspacing=1.6, handletextpad=0.6, borderaxespad=0.4
    )


def _scale(axes: Axes, which: str, axis: Axis, values: Sequence[float], *, named: bool = True) -> None:
    """Set scale, limits, ticks and name of an axis, so that all values have room."""
    of, limit = getattr(axes, f"{which}axis"), getattr(axes, f"set_{which}lim")
    if named:
        getattr(axes, f"set_{which}label")(axis.label)
    low, high = min(values), max(values)
    if axis.scale == "linear":
        room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        limit(low - room, high + room)
        of.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    elif axis.scale == "log":
        getattr(axes, f"set_{which}scale")("log")
        room = (high / low) ** 0.08 if high > low else 1.5
        limit(low / room, high * room)
        of.set_major_locator(FixedLocator(_log_ticks(low / room, high * room)))
    else:
        turn = decade_below(values)
        getattr(axes, f"set_{which}scale")("symlog", linthresh=turn, linscale=0.6)
        room = (high / turn) ** 0.1
        limit(-0.25 * turn, high * room)
        of.set_major_locator(FixedLocator([0.0, *_log_ticks(turn, high * room)]))
    of.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    of.set_minor_locator(NullLocator())
    of.set_minor_formatter(NullFormatter())


def _log_ticks(low: float, high: float) -> list[float]:
    """Return about 3 to 7 round numbers between two bounds on a logarithmic axis."""
    first, last = floor(log10(low)), ceil(log10(high))
    decades = last - first
    steps = (1,) if decades > 3 else (1, 3) if decades > 2 else (1, 2, 5)
    stride = max(1, ceil(decades / 7))
    ticks = [step * 10.0**power for power in range(first, last + 1, stride) for step in steps]
    return [value for value in ticks if low * 0.999 <= value <= high * 1.001]


def tick(value: float) -> str:
    """Write the number of a tick: '0', '0.02', '1,500', '1e-5'."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}"
