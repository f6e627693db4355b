"""Drawing heat maps of linears: a panel a row of the comparison, one scale of colours for all."""

from __future__ import annotations

from math import ceil

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from llmq.results.palette import contrast
from llmq.results.plot_types import HeatMaps, Panel

WIDTH_IN = 9.6
ROW_IN = 0.235
"""Height of a row of cells."""
MOST_WRITTEN = 12
"""Layers up to which the cells of a panel say their values, and two panels stand side by side."""
COLOURS, STEPS = "cividis", 40
"""Grows lighter evenly, and looks the same to those who do not see red or green. From 50 steps on matplotlib draws the bar of a
colour scale as an image in the SVG, which has no text alternative and does not scale."""


def draw_heat_maps(plot: HeatMaps) -> Figure:
    """Return a figure of the panels."""
    across = 2 if len(plot.layers) <= MOST_WRITTEN and len(plot.panels) > 1 else 1
    down = ceil(len(plot.panels) / across)
    figure = Figure((WIDTH_IN, 0.75 + down * (0.62 + ROW_IN * len(plot.kinds))), layout="constrained")
    all_axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    figure.suptitle(plot.title, x=0.006, ha="left", fontsize=11, fontweight="bold")
    low, high = plot.range
    norm = Normalize(low, high if high > low else low + 1.0)
    colours = mpl.colormaps[COLOURS].resampled(STEPS)
    for index, axes in enumerate(all_axes):
        if index < len(plot.panels):
            _draw_panel(axes, plot, index, norm, colours)
            axes.tick_params(labelleft=index % across == 0)
        else:
            axes.set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=figure.axes, pad=0.012, aspect=30, fraction=0.05)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # no hairlines between the steps
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    bar.update_ticks()
    bar.set_label("" if plot.unit == "1" else plot.unit)
    figure.supxlabel("layer", fontsize=10)
    return figure


def _draw_panel(axes: Axes, plot: HeatMaps, index: int, norm: Normalize, colours: Colormap) -> None:
    panel: Panel = plot.panels[index]
    axes.set_title(panel.label, fontsize=9.5, fontweight="normal", pad=4)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlim(0, len(plot.layers))
    axes.set_ylim(len(plot.kinds), 0)
    every = ceil(len(plot.layers) / 24)
    axes.set_xticks([place + 0.5 for place in range(0, len(plot.layers), every)], plot.layers[::every])
    axes.set_yticks([place + 0.5 for place in range(len(plot.kinds))], plot.kinds)
    axes.tick_params(length=0, labelbottom=True)
    digits = digits_for(*plot.range)
    for row, values in enumerate(panel.values):
        for column, value in enumerate(values):
            if value is None:
                continue
            fill = to_hex(colours(norm(value)))
            axes.add_patch(Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, fc=fill, lw=0, gid=f"cell-{index}-{row}-{column}"))
            if len(plot.layers) <= MOST_WRITTEN:
                ink = max(("#000000", "#fefefe"), key=lambda colour: contrast(fill, colour))
                centre = (column + 0.5, row + 0.52)
                axes.text(*centre, f"{value:.{digits}f}", ha="center", va="center", fontsize=7.5, color=ink)


def digits_for(low: float, high: float) -> int:
    """Return how many decimals tell values of a range apart, at most five."""
    width = high - low
    return next((digits for digits in range(5) if width >= 100 * 10.0**-digits), 5)
