"""What plots show is what the records say."""

from __future__ import annotations

import pytest
from report_runs import LAYERS, SCHEMES, WALL_GBPS, example_records, layers_record

from llmq.results.plot_types import Axis, Curves, HeatMaps, Plot, Scatter
from llmq.results.plots import decade_below, plots_of, scale_of
from llmq.results.record import Metric


@pytest.fixture(scope="module")
def plots() -> dict[str, Plot]:
    return {plot.name: plot for plot in plots_of([*example_records(), layers_record()])}


def scatter(plots: dict[str, Plot], name: str) -> Scatter:
    found = plots[name]
    assert isinstance(found, Scatter)
    return found


def test_there_is_a_plot_of_everything_that_was_measured(plots: dict[str, Plot]) -> None:
    assert list(plots) == ["size", "speed", "kl", "roofline", "latency", "sqnr", "loss", "cost", "output-error"]


def test_points_are_the_records_figures(plots: dict[str, Plot]) -> None:
    points = {point.label.split(" ")[0]: point for point in scatter(plots, "size").points}
    assert {label: (point.x, point.y) for label, point in points.items()} == {
        scheme: (known["size"], known["kl"]) for scheme, known in SCHEMES.items()
    }
    assert points["int4-gptq"].y_error == pytest.approx(0.0121 / 30)
    speeds = {point.label.split(" ")[0]: point for point in scatter(plots, "speed").points}
    assert {label: point.x for label, point in speeds.items()} == {scheme: known["rate"] for scheme, known in SCHEMES.items()}
    assert speeds["bf16"].x_error == pytest.approx(95 / 50)


@pytest.mark.parametrize("name", ["size", "speed"])
def test_the_front_leaves_out_what_is_beaten_and_is_named(plots: dict[str, Plot], name: str) -> None:
    plot = scatter(plots, name)
    assert {point.label for point in plot.front} == {"bf16", "int8-weight-only", "int4-gptq group_size=32"}
    assert [point.x for point in plot.front] == sorted(point.x for point in plot.front)
    assert "bf16, int8-weight-only, int4-gptq group_size=32." in plot.caption
    assert "int8-dynamic" not in plot.caption


def test_series_are_the_rows_of_the_comparison(plots: dict[str, Plot]) -> None:
    for name in ("size", "speed", "roofline"):
        assert [point.series for point in scatter(plots, name).points] == [0, 1, 2, 3]
    kl = plots["kl"]
    assert isinstance(kl, Curves)
    assert [curve.series for curve in kl.curves] == [1, 2, 3]  # bf16 has no divergence, and its colour stays its own


def test_perplexity_where_no_divergence_was_measured() -> None:
    records = [record for record in example_records() if record.kind != "divergence"]
    plot = scatter({plot.name: plot for plot in plots_of(records)}, "size")
    assert plot.y.quantity == "perplexity"
    assert plot.points[0].y == 24.0
    assert plot.y.label == "perplexity, less is better"


def test_a_row_without_both_figures_is_named_and_left_out() -> None:
    records = [record for record in example_records() if (record.kind, record.subject.scheme) != ("decode", "int8-dynamic")]
    plot = scatter({plot.name: plot for plot in plots_of(records)}, "speed")
    assert [point.series for point in plot.points] == [0, 1, 3]
    assert plot.caption.endswith("Not measured in both: int8-dynamic.")


def test_one_row_is_no_scatter_and_no_records_no_plots() -> None:
    names = [plot.name for plot in plots_of(example_records({"bf16": SCHEMES["bf16"]}))]
    assert names == ["roofline", "latency"]
    assert plots_of([]) == ()


def test_the_roofline_has_the_machines_line(plots: dict[str, Plot]) -> None:
    plot = scatter(plots, "roofline")
    assert plot.walls == (WALL_GBPS,)
    for point, known in zip(plot.points, SCHEMES.values(), strict=True):
        assert point.x == known["step"]
        assert point.y == pytest.approx(known["step"] * known["rate"] / 1e9)
        assert point.note == f"{100 * point.y / WALL_GBPS:.0f} %"
    assert "3.1 GB/s" in plot.caption


def test_machines_that_were_measured_twice_have_two_lines() -> None:
    records = example_records()
    last = records[-1]
    other = last.metrics | {"machine_bandwidth_gbps": Metric(value=4.0, unit="GB/s")}
    plots = plots_of([*records[:-1], last.model_copy(update={"metrics": other})])
    assert scatter({plot.name: plot for plot in plots}, "roofline").walls == (WALL_GBPS, 4.0)


def test_curves_are_shares_and_zeros_are_named(plots: dict[str, Plot]) -> None:
    kl, latency = plots["kl"], plots["latency"]
    assert isinstance(kl, Curves)
    assert isinstance(latency, Curves)
    assert [sum(curve.shares) for curve in kl.curves] == pytest.approx([1.0] * 3)
    assert kl.curves[0].shares[4] == 0.5
    assert "exactly 0 have no place on the axis: bf16 100 %." in kl.caption
    assert [curve.mark for curve in latency.curves] == [1.05 / known["rate"] for known in SCHEMES.values()]
    assert latency.curves[0].shares == (10 / 64, 50 / 64, 4 / 64)


def test_heat_maps_have_every_linear_at_its_place(plots: dict[str, Plot]) -> None:
    sqnr = plots["sqnr"]
    assert isinstance(sqnr, HeatMaps)
    assert sqnr.kinds == ("q", "o", "down")
    assert sqnr.layers == tuple(map(str, range(LAYERS)))
    assert [panel.label for panel in sqnr.panels] == ["int8-weight-only", "int8-dynamic", "int4-gptq group_size=32"]
    for panel in sqnr.panels:
        assert panel.values[2][1] == 21.5  # down of layer 1
    assert sqnr.range == (20.0, 22.5)


def test_loss_is_against_rounding_to_nearest_where_it_is_known(plots: dict[str, Plot]) -> None:
    loss = plots["loss"]
    assert isinstance(loss, HeatMaps)
    assert [panel.label for panel in loss.panels] == ["int4-gptq group_size=32"]
    assert loss.panels[0].values[0] == pytest.approx((0.2, 0.4, 0.6))


def test_what_single_linears_cost(plots: dict[str, Plot]) -> None:
    cost = plots["cost"]
    assert isinstance(cost, HeatMaps)
    assert cost.unit == "10⁻³ nats/token"
    assert cost.panels[0].values[1] == pytest.approx((2.0, 3.0, 4.0))


def test_layers_are_sorted_as_numbers_and_a_missing_linear_is_a_hole() -> None:
    record = layers_record()
    linears = {f"model.layers.{layer}.mlp.up_proj": {"cost_kl": Metric(value=layer, unit="1")} for layer in (10, 9, 2)}
    linears |= {"lm_head": {"cost_kl": Metric(value=5.0, unit="1")}}
    details = record.details.model_copy(update={"layers": linears})
    (plot,) = plots_of([record.model_copy(update={"details": details})])
    assert isinstance(plot, HeatMaps)
    assert plot.layers == ("2", "9", "10", "–")
    assert plot.kinds == ("up", "lm_head")
    assert plot.panels[0].values == ((2000.0, 9000.0, 10000.0, None), (None, None, None, 5000.0))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 7.9], "linear"),
        ([1.0, 8.0], "log"),
        ([0.0, 1.0, 8.0], "symlog"),
        ([0.0, 1.0], "linear"),
        ([-1.0, 1.0, 100.0], "linear"),
        ([0.0], "linear"),
        ([], "linear"),
    ],
)
def test_scales(values: list[float], scale: str) -> None:
    assert scale_of(values) == scale


def test_axes_say_their_unit_and_which_end_is_better() -> None:
    assert Axis("size", "MB", better="less").label == "size (MB), less is better"
    assert Axis("share of tokens", "1").label == "share of tokens"
    assert decade_below([0.0, 0.00027, 5.0]) == pytest.approx(1e-4)
