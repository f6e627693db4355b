"""Drawn plots: every figure is in the SVG, nothing is cut off or covered, and the same records give the same bytes."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report_runs import SCHEMES, WALL_GBPS, example_records, layers_record

from llmq.results.drawing import draw, style, tick
from llmq.results.drawing_heat import digits_for
from llmq.results.drawing_svg import to_inline_svg, to_png, to_svg
from llmq.results.palette import LIGHT
from llmq.results.plot_types import Plot
from llmq.results.plots import plots_of

SVG = "{http://www.w3.org/2000/svg}"
PLOTS = {plot.name: plot for plot in plots_of([*example_records(), layers_record()])}
LONG = {f"int4-gptq-of-a-very-long-name-{index}": {**SCHEMES["int4-gptq"], "kl": 0.01 + index / 1e3} for index in range(12)}
CROWDED = {plot.name: plot for plot in plots_of(example_records(LONG))}

every_plot = pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)


def classed(text: str, name: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(text).iter() if element.get("class") == name]


def drawn(plot: Plot) -> Figure:
    with style():
        figure = draw(plot)
        FigureCanvasAgg(figure).draw()
    return figure


@every_plot
def test_it_says_what_it_is(plot: Plot) -> None:
    root = ET.fromstring(to_svg(plot))
    assert root.get("role") == "img"
    title, description = root[0], root[1]
    assert (title.tag, title.text) == (f"{SVG}title", plot.title)
    assert (description.tag, description.text) == (f"{SVG}desc", plot.caption)
    assert root.attrib["aria-labelledby"].split() == [title.get("id"), description.get("id")]
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert plot.title in texts


@pytest.mark.parametrize("name", ["size", "speed", "roofline"])
def test_points_hold_their_figures(name: str) -> None:
    plot = PLOTS[name]
    points = classed(to_svg(plot), "point")
    for element, point in zip(points, plot.points, strict=True):
        assert element.get("data-label") == point.label
        assert float(element.attrib["data-x"]) == point.x
        assert float(element.attrib["data-y"]) == point.y
        errors = {"data-x-error": point.x_error, "data-y-error": point.y_error}
        assert {key: float(element.attrib[key]) for key in errors if key in element.attrib} == {
            key: value for key, value in errors.items() if value is not None
        }
        assert element[0].tag == f"{SVG}title"
        assert element[0].text.startswith(f"{point.label}: ")
    if name != "roofline":
        assert [element.get("data-front") for element in points] == ["true", "true", "false", "true"]


def test_points_stand_where_their_figures_say() -> None:
    """Positions on the canvas are in the order of the figures, and the linear axis is linear."""
    marks = [element.find(f".//{SVG}use") for element in classed(to_svg(PLOTS["size"]), "point")]
    xs = [float(mark.attrib["x"]) for mark in marks if mark is not None]
    sizes = [known["size"] for known in SCHEMES.values()]
    scale = (xs[0] - xs[3]) / (sizes[0] - sizes[3])
    assert xs == pytest.approx([xs[3] + scale * (size - sizes[3]) for size in sizes], abs=1e-3)
    heights = [float(mark.attrib["y"]) for mark in marks if mark is not None]
    assert sorted(heights, reverse=True) == heights  # y grows downwards, and each scheme loses more than the one before


def test_hover_texts_have_units_and_errors() -> None:
    (point,) = [element for element in classed(to_svg(PLOTS["speed"]), "point") if "int4" in element.attrib["data-label"]]
    assert point[0].text == (
        "int4-gptq group_size=32: KL from the original 0.0121 ± 0.0004 nats/token, decode speed 310 ± 6 tokens/s"
    )
    (wall,) = classed(to_svg(PLOTS["roofline"]), "wall")
    assert float(wall.attrib["data-y"]) == WALL_GBPS
    assert wall[0].text == "the machine, as measured: 3.10 GB/s"


def test_cells_and_curves_hold_theirs() -> None:
    cells = classed(to_svg(PLOTS["cost"]), "cell")
    assert [float(cell.attrib["data-value"]) for cell in cells[:3]] == pytest.approx([1.0, 2.0, 3.0])
    assert cells[4][0].text == "int4-gptq group_size=32, layer 1, o: 3.000 10⁻³ nats/token"
    curves = classed(to_svg(PLOTS["kl"]), "curve")
    assert (curves[0].get("data-label"), curves[0].get("data-total")) == ("int8-weight-only", "1000")


@pytest.mark.slow
@every_plot
def test_the_same_plot_gives_the_same_bytes(plot: Plot) -> None:
    assert to_svg(plot) == to_svg(plot)
    assert "<metadata" not in to_svg(plot)


def test_the_users_own_settings_change_nothing() -> None:
    expected = to_svg(PLOTS["size"])
    with mpl.rc_context({"lines.linewidth": 9.0, "text.color": "red", "axes.unicode_minus": False, "svg.fonttype": "path"}):
        assert to_svg(PLOTS["size"]) == expected
        assert mpl.rcParams["lines.linewidth"] == 9.0


def test_the_same_plot_gives_the_same_image() -> None:
    image = to_png(PLOTS["size"])
    assert image == to_png(PLOTS["size"])
    assert image.startswith(b"\x89PNG")
    assert b"Software" not in image


@pytest.mark.slow
@pytest.mark.parametrize("plot", [*PLOTS.values(), *CROWDED.values()], ids=[*PLOTS, *(f"crowded {name}" for name in CROWDED)])
def test_nothing_is_cut_off(plot: Plot) -> None:
    figure = drawn(plot)
    inner = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert inner.x0 >= -0.02
    assert inner.y0 >= -0.02
    assert inner.x1 <= width + 0.02
    assert inner.y1 <= height + 0.02


@pytest.mark.parametrize("plots", [PLOTS, pytest.param(CROWDED, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", ["size", "kl", "roofline"])
def test_the_legend_covers_no_point(plots: dict[str, Plot], name: str) -> None:
    figure = drawn(plots[name])
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y1 <= axes.y0
    assert axes.height > 2.0 * figure.dpi  # and takes no room from the plot


@pytest.mark.parametrize("plots", [PLOTS, pytest.param(CROWDED, marks=pytest.mark.slow)], ids=["few", "many"])
def test_the_names_of_rows_cover_no_bar(plots: dict[str, Plot]) -> None:
    rows = drawn(plots["latency"]).axes
    for above, below in pairwise([None, *rows]):
        name = below.title.get_window_extent()
        assert name.y0 >= below.get_window_extent().y1
        assert above is None or name.y1 <= above.get_window_extent().y0
        assert below.get_window_extent().height > 20


@pytest.mark.parametrize("name", ["size", "speed", "roofline"])
def test_points_and_their_errors_are_within_the_axes(name: str) -> None:
    plot = PLOTS[name]
    axes = drawn(plot).axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for point in plot.points:
        x, y, x_error, y_error = point.x, point.y, point.x_error or 0.0, point.y_error or 0.0
        assert left < (x - x_error) * plot.x.factor
        assert (x + x_error) * plot.x.factor < right
        assert bottom < (y - y_error) * plot.y.factor
        assert (y + y_error) * plot.y.factor < top


def test_inline_plots_take_the_pages_colours_and_share_no_ids() -> None:
    first, second = to_inline_svg(PLOTS["size"], "one"), to_inline_svg(PLOTS["speed"], "two")
    for text in (first, second):
        assert not [colour for colour in LIGHT.values() if colour in text]
        assert "var(--series-1)" in text
        assert "<style" not in text
    ids = [[element.get("id") for element in ET.fromstring(text).iter() if element.get("id")] for text in (first, second)]
    assert len(set(ids[0] + ids[1])) == len(ids[0]) + len(ids[1])
    links = [
        value[1:]
        for element in ET.fromstring(first).iter()
        for name, value in element.attrib.items()
        if name.endswith("href") and value.startswith("#")
    ]
    assert links
    assert set(links) <= set(ids[0])


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "cost $5$ or \\alpha_{x", "模型 🙂", 'a "quoted" & name'])
def test_names_are_names_and_nothing_else(name: str) -> None:
    records = example_records({name: SCHEMES["bf16"], "int4-gptq": SCHEMES["int4-gptq"]})
    plots = {plot.name: plot for plot in plots_of(records)}
    for text in (to_svg(plots["size"]), to_svg(plots["latency"])):
        elements = list(ET.fromstring(text).iter())
        assert name in [element.get("data-label") for element in elements]
        assert name in [element.text for element in elements if element.tag == f"{SVG}text"]
        assert not [element for element in elements if element.tag == f"{SVG}script"]
    assert to_png(plots["size"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.02, "0.02"),
        (1500.0, "1,500"),
        (1e-5, "1e-5"),
        (3e-4, "3e-4"),
        (2.5, "2.5"),
        (-12.0, "-12"),
        (1e7, "10,000,000"),
    ],
)
def test_ticks(value: float, text: str) -> None:
    assert tick(value) == text


@pytest.mark.parametrize(("low", "high", "digits"), [(15.0, 44.0, 1), (0.05, 0.5, 3), (0.0, 1000.0, 0), (1.0, 1.0, 5)])
def test_cells_have_digits_that_tell_them_apart(low: float, high: float, digits: int) -> None:
    assert digits_for(low, high) == digits
