"""int8-smoothquant through the walk: the formats it makes, what its options do, and that it is nearer to the original."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms.metric import Metric
from llmq.algorithms.rounding import RoundingReport
from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.statistics import Needs, Statistics
from llmq.api.calibrating import CalibrationSource
from llmq.api.loading import Setup, open_model
from llmq.api.quantizing import quantize_checkpoint
from llmq.api.recipes import Recipe
from llmq.calibration.corpus import resolve_text
from llmq.calibration.factors import FactorMemory
from llmq.calibration.recorder import CalibrationSet, InputRecorder
from llmq.calibration.sequential import WalkSettings, quantize_sequential
from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint
from llmq.errors import SchemeError, UsageError
from llmq.numerics.grid import ActivationGrid, IntGrid
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import quantize_
from llmq.schemes.cover import describe_format
from llmq.schemes.registry import resolve


def calibration(path: Path, windows: int) -> tuple[Any, CalibrationSet]:
    checkpoint = open_checkpoint(path)
    recorder = InputRecorder(load_tokenizer_for(checkpoint), windows=windows, length=128)
    return load_model(checkpoint, dtype=torch.float32), recorder.record_text(resolve_text(None, split="train"))


def kl(original: Tensor, other: Tensor) -> float:
    p, q = original.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_formats() -> None:
    dynamic, static = resolve("int8-smoothquant"), resolve("int8-smoothquant", {"activations": "static"})
    assert dynamic.format == resolve("int8-dynamic").format
    assert static.format.activation == ActivationGrid(symmetric=True, static=True)
    assert dynamic.needs_calibration
    assert (dynamic.prepares, dynamic.tunes, dynamic.rotates) == (True, True, True)
    assert dynamic.needs == Needs.INPUTS | Needs.FISHER
    inputs = resolve("int8-smoothquant", {"metric": "inputs"})
    assert (inputs.tunes, inputs.needs) == (True, Needs.INPUTS)
    plain = resolve("int8-smoothquant", {"smoothing": "none", "compensate": "false"})
    assert (plain.prepares, plain.tunes) == (False, False)
    assert {"alpha_step", "damping", "metric", "most_input_cost"}.isdisjoint(plain.options_json())
    assert "most_input_cost" not in inputs.options_json()
    assert resolve("int8-smoothquant", {"compensate": "false", "activations": "static"}).tunes
    with pytest.raises(UsageError):
        resolve("int8-smoothquant", {"alpha_step": 0})
    with pytest.raises(SchemeError, match="use int8-dynamic"):
        dynamic.quantize_weight(torch.randn(4, 8), None, "some.linear")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8-smoothquant", {"alpha_step": 0.5, "most_input_cost": 1e9}),
        ("int4-awq", {"rounding_by": "gptq", "metric": "fisher", "exponents": 3}),
    ],
)
def test_fisher_factors_go_with_the_folded_weight(
    short_model: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    """tr(H_O W H_I W^T) is one number however scales are moved: with W' = W columns / rows, both factors follow."""
    seen: list[tuple[Tensor, Statistics]] = []

    def round_to_nearest(weight: Tensor, statistics: Statistics, grid: IntGrid, options: Any) -> Any:
        seen.append((weight, statistics))
        return quantize_rtn(weight, grid), RoundingReport(None, None)

    module = "int8_smoothquant" if name == "int8-smoothquant" else "int4_gptq"
    monkeypatch.setattr(f"llmq.schemes.{module}.round_linear", round_to_nearest)
    model, windows = calibration(short_model, 4)
    plain = {fqn: linear.weight.detach().clone() for fqn, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    factors = FactorMemory()
    settings = WalkSettings(activations="fp32", factors=factors)
    _, reports = quantize_sequential(model, resolve(name, options), windows, skip=["lm_head"], settings=settings)
    assert len(seen) == len(reports) == 7 * 3
    changed = 0
    for report, (weight, statistics) in zip(reports, seen, strict=True):
        inputs, outputs = factors.read(report.fqn)
        before = plain[report.fqn]
        assert statistics.input_factor is not None
        assert statistics.output_factor is not None
        expected = Metric(inputs, outputs).loss(before)
        assert Metric(statistics.input_factor, statistics.output_factor).loss(weight) == pytest.approx(expected, rel=1e-3)
        changed += not torch.equal(weight, before)
    assert changed > 7


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_walk_without_smoothing_is_int8_dynamic(wt2_8m: Path, activations: str) -> None:
    model, windows = calibration(wt2_8m, 12)
    tokens = InputRecorder(load_tokenizer_for(open_checkpoint(wt2_8m)), windows=4, length=128, seed=9).record_text(
        resolve_text(None, split="test")
    )
    with torch.no_grad():
        original = model(tokens.tokens.long())
        quantized, _ = calibration(wt2_8m, 1)
        resolved = resolve("int8-smoothquant", {"activations": activations, "smoothing": "none", "compensate": "false"})
        _, reports = quantize_sequential(quantized, resolved, windows, skip=["lm_head"])
        assert len(reports) == 7 * 8
        weight = quantized.blocks[0].mlp.down_proj.weight
        assert isinstance(weight, QuantizedTensor)
        plain = kl(original, quantized(tokens.tokens.long()))
        dynamic, _ = calibration(wt2_8m, 1)
        quantize_(dynamic, resolve("int8-dynamic"), skip=["lm_head"])
        nearest = kl(original, dynamic(tokens.tokens.long()))
    assert plain < 20 * nearest  # one scale for all tokens costs some, and breaks nothing
    if activations == "dynamic":
        assert plain == pytest.approx(nearest, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_inputs_that_cost_too_much_are_kept(
    short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: str
) -> None:
    """One linear is said to cost much: it becomes int8-weight-only, everywhere that says what linears are."""
    costs = iter([0.5 if index == 7 + 6 else 1e-3 for index in range(7 * 3)])
    monkeypatch.setattr("llmq.schemes.int8_smoothquant.rounding_cost", lambda *_: next(costs))
    options = {"activations": activations, "smoothing": "none", "most_input_cost": "0.1"}
    recipe = Recipe("int8-smoothquant", options, calibration=CalibrationSource(windows=3, length=64))
    made = quantize_checkpoint(str(short_model), recipe, Setup(threads=1), tmp_path / "out")
    assert made is not None
    kept = "model.layers.1.mlp.down_proj"
    weight_only = resolve("int8-weight-only").format
    own = resolve("int8-smoothquant", {"activations": activations}).format
    layers = {layer["fqn"]: layer for layer in made.manifest.layers}
    assert [fqn for fqn, layer in layers.items() if layer["format"]] == [kept]
    assert layers[kept]["format"] == weight_only.to_json()
    assert made.loaded.coverage is not None
    rows = {row.fqn: row.target for row in made.loaded.coverage.rows}
    assert rows[kept] == describe_format(weight_only)
    assert rows["model.layers.0.mlp.down_proj"] == describe_format(own)
    model = open_model(str(tmp_path / "out"), None, Setup(threads=1)).model
    for fqn in layers:
        weight = model.get_submodule(fqn).weight
        assert isinstance(weight, QuantizedTensor)
        assert weight.format == (weight_only if fqn == kept else own)
    assert torch.isfinite(model(torch.arange(20)[None])).all()


def test_costs_come_from_the_inputs_and_factors_of_each_linear(short_model: Path) -> None:
    """A limit between the costs keeps just the inputs above it; 0 keeps all."""
    model, windows = calibration(short_model, 2)
    settings = {"smoothing": "none", "most_input_cost": 0.0}
    _, reports = quantize_sequential(model, resolve("int8-smoothquant", settings), windows, skip=["lm_head"])
    assert all(report.format == resolve("int8-weight-only").format.to_json() for report in reports)
    model, _ = calibration(short_model, 2)
    _, reports = quantize_sequential(
        model, resolve("int8-smoothquant", settings | {"most_input_cost": 1e3}), windows, skip=["lm_head"]
    )
    assert all(report.format is None for report in reports)
