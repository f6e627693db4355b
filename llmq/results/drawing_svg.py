"""Plots as bytes: PNG, and SVG that says in words and in attributes what its points are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from xml.etree import ElementTree as ET

from llmq.results import figures
from llmq.results.drawing import draw, style
from llmq.results.palette import LIGHT
from llmq.results.plot_types import Curves, HeatMaps, Plot, Scatter

DOTS_PER_INCH = 160
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_LINKS = ("href", f"{{{_XLINK}}}href")


def to_png(plot: Plot) -> bytes:
    """Draw a plot as PNG; the same plot gives the same bytes."""
    with style(), BytesIO() as file:
        draw(plot).savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        return file.getvalue()


def to_svg(plot: Plot) -> str:
    """Draw a plot as an SVG file; the same plot gives the same text."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _text(_described(plot, plot.name)) + "\n"


def to_inline_svg(plot: Plot, prefix: str) -> str:
    """Draw a plot as an element of a page, with the page's colours and font.

    Args:
        plot: what to draw.
        prefix: of all ids in it; no two plots of a page share one.
    """
    root = _described(plot, prefix)
    for name in ("width", "height"):
        del root.attrib[name]
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", _with_variables(element.attrib["style"]))
    return _text(root)


def _text(root: ET.Element) -> str:
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")


def _described(plot: Plot, prefix: str) -> ET.Element:
    """Draw a plot, and tell what it is: title, description, and the figures of each point, curve or cell."""
    with style(), BytesIO() as file:
        draw(plot).savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        root = ET.fromstring(file.getvalue())  # noqa: S314 - what matplotlib has just written
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for defs in root.findall(f"{{{_SVG}}}defs"):  # one rule for all elements, which would be a rule for the whole page
        for rule in defs.findall(f"{{{_SVG}}}style"):
            defs.remove(rule)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    told = dict(_told(plot))
    for element in root.iter():
        if element.get("id") in told:
            _tell(element, *told[element.attrib["id"]])
        _prefix(element, prefix)
    root.attrib |= {"role": "img", "class": "plot", "data-plot": plot.name, "aria-labelledby": f"{prefix}-title {prefix}-desc"}
    for place, (tag, text) in enumerate((("title", plot.title), ("desc", plot.caption))):
        child = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{prefix}-{tag}"})
        child.text = text
        root.insert(place, child)
    return root


def _told(plot: Plot) -> Iterator[tuple[str, tuple[str, str, Mapping[str, object]]]]:
    """Return what is to be said of the artists with an id: class, words, and data in the records' units."""
    if isinstance(plot, Scatter):
        for index, point in enumerate(plot.points):
            x = f"{plot.x.quantity} {_figure(point.x, point.x_error, plot.x.factor, plot.x.unit)}"
            y = f"{plot.y.quantity} {_figure(point.y, point.y_error, plot.y.factor, plot.y.unit)}"
            words = ", ".join([f"{point.label}: {y}", x, *([point.note] if point.note else [])])
            data = {"x": point.x, "y": point.y, "x-error": point.x_error, "y-error": point.y_error, "front": point.on_front}
            yield f"point-{index}", ("point", words, {"label": point.label, **data})
        for index, wall in enumerate(plot.walls):
            yield f"wall-{index}", ("wall", f"the machine, as measured: {figures.plain(wall, 3)} {plot.y.unit}", {"y": wall})
    elif isinstance(plot, Curves):
        for index, curve in enumerate(plot.curves):
            words = f"{curve.label}: {curve.total:,} values"
            yield f"curve-{index}", ("curve", words, {"label": curve.label, "total": curve.total, "mark": curve.mark})
    else:
        yield from _told_of_cells(plot)


def _told_of_cells(plot: HeatMaps) -> Iterator[tuple[str, tuple[str, str, Mapping[str, object]]]]:
    unit = "" if plot.unit == "1" else f" {plot.unit}"
    for index, panel in enumerate(plot.panels):
        for row, kind in enumerate(plot.kinds):
            for column, layer in enumerate(plot.layers):
                value = panel.values[row][column]
                if value is not None:
                    words = f"{panel.label}, layer {layer}, {kind}: {figures.plain(value)}{unit}"
                    data = {"label": panel.label, "layer": layer, "kind": kind, "value": value}
                    yield f"cell-{index}-{row}-{column}", ("cell", words, data)


def _figure(value: float, stderr: float | None, factor: float, unit: str) -> str:
    return figures.with_error(value, stderr, factor=factor, unit="" if unit == "1" else f" {unit}")


def _tell(element: ET.Element, kind: str, words: str, data: Mapping[str, object]) -> None:
    element.set("class", kind)
    for name, value in data.items():
        if value is not None:
            element.set(f"data-{name}", str(value).lower() if isinstance(value, bool) else str(value))
    title = ET.Element(f"{{{_SVG}}}title")
    title.text = words
    element.insert(0, title)


def _prefix(element: ET.Element, prefix: str) -> None:
    """Keep the ids of one plot apart from those of another, and what refers to them."""
    if "id" in element.attrib:
        element.set("id", f"{prefix}-{element.attrib['id']}")
    for link in _LINKS:
        if element.get(link, "").startswith("#"):
            element.set(link, f"#{prefix}-{element.attrib[link][1:]}")
    for name in ("clip-path", "style"):
        if "url(#" in element.get(name, ""):
            element.set(name, element.attrib[name].replace("url(#", f"url(#{prefix}-"))


def _with_variables(rules: str) -> str:
    """Let the page say what the named colours are, in the light and in the dark."""
    names = {colour: name for name, colour in LIGHT.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--{names[found[0]]})" if found[0] in names else found[0], rules)
