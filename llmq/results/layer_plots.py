"""Heat maps of what is known of single linears: by layer, and by kind of projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmq.results.layers import place_of
from llmq.results.plot_types import HeatMaps, Panel
from llmq.results.record import Metric, ResultRecord
from llmq.results.table import KINDS, joined

Figures = Mapping[str, Metric]
"""What is known of one linear, by the name of the figure."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A heat map: what is taken of a linear's figures, and what is said of it."""

    name: str
    title: str
    unit: str
    caption: str
    take: Callable[[Figures], float | None]
    tells: float = 0.0
    """Rows of the comparison whose linears do not differ by more are left out."""


def _value(name: str, factor: float = 1.0) -> Callable[[Figures], float | None]:
    return lambda figures: factor * figures[name].value if name in figures else None


def _loss_of_rtn(figures: Figures) -> float | None:
    """Return the loss over that of rounding to nearest, None where there is no such ratio."""
    if "loss" not in figures or "rtn_loss" not in figures or figures["rtn_loss"].value <= 0:
        return None
    return figures["loss"].value / figures["rtn_loss"].value


_KNOWN = (
    _Shown(
        "sqnr",
        "Signal to noise of the weights",
        "dB",
        "Signal to quantization noise of each weight; more is better, and 6 dB are about one bit.",
        _value("sqnr"),
    ),
    _Shown(
        "loss",
        "Loss against rounding to nearest",
        "1",
        "Loss on the calibration inputs over that of rounding to nearest on the same grid; less is better, and 1 means no gain.",
        _loss_of_rtn,
    ),
    _Shown(
        "bits",
        "Bits per weight",
        "bits",
        "All stored bits of each weight over its elements, where a scheme does not give all linears the same.",
        _value("bits_per_weight"),
        tells=0.25,  # more than what the scales of rows of different lengths make
    ),
)
_SINGLED = (
    _Shown(
        "cost",
        "What each linear costs",
        "10⁻³ nats/token",
        "KL from the original that goes away when one linear gets its original weight back and all others stay quantized.",
        _value("cost_kl", 1e3),
    ),
    _Shown(
        "alone",
        "What each linear costs alone",
        "10⁻³ nats/token",
        "KL from the original with one linear quantized and all others as they were.",
        _value("alone_kl", 1e3),
    ),
    _Shown(
        "output-error",
        "Error of the outputs from the weight",
        "%",
        "Error that a quantized weight makes in the outputs of its linear, relative to them; less is better.",
        _value("weight_error", 100.0),
    ),
)
"""Of records of kind 'layers'."""


def layer_plots(records: Sequence[ResultRecord]) -> list[HeatMaps]:
    """Return a heat map of each figure that tells linears apart, from records that may be compared."""
    quantized = _figures_by_label([record for record in records if record.kind in KINDS])
    singled = _figures_by_label([record for record in records if record.kind == "layers"])
    found = [_heat_maps(shown, quantized) for shown in _KNOWN] + [_heat_maps(shown, singled) for shown in _SINGLED]
    return [plot for plot in found if plot is not None]


def _figures_by_label(records: Sequence[ResultRecord]) -> dict[str, dict[str, Figures]]:
    """Return the figures of every linear by the label of its row in the comparison."""
    rows, _ = joined(records)
    found = {}
    for row in rows:
        linears: dict[str, Figures] = {}
        for record in row.records.values():
            linears |= record.details.layers
        if linears:
            found[row.label] = linears
    return found


def _heat_maps(shown: _Shown, by_label: Mapping[str, Mapping[str, Figures]]) -> HeatMaps | None:
    """Return the heat maps of one figure, without rows of the comparison in which it tells nothing apart."""
    taken: dict[str, dict[tuple[str, str], float]] = {}
    for label, linears in by_label.items():
        values = {place_of(fqn): value for fqn, figures in linears.items() if (value := shown.take(figures)) is not None}
        if values and max(values.values()) - min(values.values()) > shown.tells:
            taken[label] = values
    if not taken:
        return None
    places = dict.fromkeys(place for values in taken.values() for place in values)
    layers = sorted(dict.fromkeys(layer for layer, _ in places), key=_numbers_first)
    kinds = list(dict.fromkeys(kind for _, kind in places))
    panels = tuple(
        Panel(label, tuple(tuple(values.get((layer, kind)) for layer in layers) for kind in kinds))
        for label, values in taken.items()
    )
    return HeatMaps(shown.name, shown.title, shown.caption, shown.unit, tuple(kinds), tuple(layers), panels)


def _numbers_first(layer: str) -> tuple[int, int]:
    return (0, int(layer)) if layer.isdigit() else (1, 0)
