"""What a plot shows, as plain data that nothing has drawn yet: points, curves and heat maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log", "symlog"]


@dataclass(frozen=True, slots=True)
class Axis:
    """What is along an axis. `factor` times a value is what the ticks say, in `unit`."""

    quantity: str
    unit: str
    scale: Scale = "linear"
    factor: float = 1.0
    better: Literal["less", "more"] | None = None

    @property
    def label(self) -> str:
        """Quantity, unit, and which end is the better one."""
        unit = "" if self.unit == "1" else f" ({self.unit})"
        return self.quantity + unit + (f", {self.better} is better" if self.better else "")


@dataclass(frozen=True, slots=True)
class Point:
    """A row of the comparison at its two figures, in the records' own units."""

    label: str
    series: int
    """Place of the row in the comparison: the same colour in every plot."""
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None
    on_front: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Scatter:
    """Points of all rows, with the Pareto front or a line of the machine's."""

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    points: tuple[Point, ...]
    walls: tuple[float, ...] = ()
    """Of the y axis, in its records' unit: what the machine can do, as often as it was measured."""

    @property
    def front(self) -> tuple[Point, ...]:
        """The points of the Pareto front by their x."""
        return tuple(sorted((point for point in self.points if point.on_front), key=lambda point: point.x))


@dataclass(frozen=True, slots=True)
class Curve:
    """A distribution: shares of all values between edges, and one value of it that the record names."""

    label: str
    series: int
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    total: int
    mark: float | None = None


@dataclass(frozen=True)
class Curves:
    """Distributions over one logarithmic axis: over one another, or one below the other."""

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A row of the comparison as a heat map: `values[kind][layer]`, None where there is no such linear."""

    label: str
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class HeatMaps:
    """One figure of every linear, by layer and kind of projection, with one scale of colours for all panels."""

    name: str
    title: str
    caption: str
    unit: str
    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    panels: tuple[Panel, ...]

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value of all panels."""
        values = [value for panel in self.panels for row in panel.values for value in row if value is not None]
        return min(values), max(values)


Plot = Scatter | Curves | HeatMaps
