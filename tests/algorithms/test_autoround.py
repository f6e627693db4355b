"""AutoRound: it starts where it is told, learns what is stored, keeps the best, and moves as its equations say."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.algorithms.autoround import TunedWeight, TuneOptions, Tuning, tune
from llmq.algorithms.rtn import quantize_rtn
from llmq.errors import SchemeError, UsageError
from llmq.numerics.grid import ActivationGrid, IntGrid
from llmq.numerics.weight import QuantizedWeight

GRIDS = {
    "float zero": IntGrid(4, 16, symmetric=False, zero_point="float", scale_dtype="bfloat16"),
    "int zero": IntGrid(3, 16, symmetric=False, zero_point="int", scale_dtype="bfloat16"),
    "symmetric": IntGrid(4, 16, symmetric=True, zero_point="none", scale_dtype="bfloat16"),
    "per channel": IntGrid(8, None, symmetric=True, zero_point="none", scale_dtype="float32"),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def weight(n: int = 6, k: int = 48, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) - 0.02


def quantized(work: Any, grid: IntGrid) -> dict[str, QuantizedWeight]:
    return {name: quantize_rtn(linear.weight.detach(), grid) for name, linear in work.linears.items()}


@grids
def test_starts_at_the_given_codes(grid: IntGrid) -> None:
    """Round to nearest, and codes as far from it as codes can be."""
    w = weight()
    nearest = quantize_rtn(w, grid)
    far = torch.randint(grid.qmin, grid.qmax + 1, w.shape, generator=torch.Generator().manual_seed(1))
    assert nearest.scale is not None
    odd = QuantizedWeight.from_codes(grid, far.to(nearest.codes().dtype), -nearest.scale, nearest.zero_point)
    for start in (nearest, odd):
        tuned = TunedWeight(w, start)
        again = tuned.quantized()
        for mine, theirs in zip(again.tensors, start.tensors, strict=True):
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(tuned.numbers(), start.dequantize(), rtol=1e-6, atol=1e-7)
    offset = TunedWeight(w, nearest).offset
    halfway = (offset.abs() - 0.5).abs() < 1e-4  # where multiplying by 1 / scale, as rounding does, breaks a tie differently
    assert bool(((offset == 0) | halfway).all())


@grids
def test_what_is_learned_is_what_is_stored(grid: IntGrid) -> None:
    tuned = TunedWeight(weight(), quantize_rtn(weight(), grid))
    generator = torch.Generator().manual_seed(2)
    for parameter in (tuned.rounding, *tuned.parameters()):
        parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    stored = tuned.quantized()
    torch.testing.assert_close(tuned.numbers(), stored.dequantize(), rtol=1e-6, atol=1e-7)
    moved = stored.codes().int() - quantize_rtn(weight(), grid).codes().int()
    assert int(moved.abs().max()) > 0


@grids
def test_gradients_are_those_of_straight_through_rounding(grid: IntGrid) -> None:
    """d number / d v = scale where the code is inside the grid and 0 at its ends; of scales against a loop over elements."""
    w = weight(2, 32)
    tuned = TunedWeight(w, quantize_rtn(w, grid))
    tuned.rounding.fill_(0.3)
    parameters = [tuned.rounding, *tuned.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    seen = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((tuned.numbers() * seen).sum(), parameters)
    n, groups, size = tuned.shape
    outer = seen.reshape(tuned.shape)
    with torch.no_grad():
        scale, zero = tuned.ranges()
        codes = tuned.codes(scale, zero)
    expected = [torch.zeros_like(gradient, dtype=torch.float64) for gradient in gradients]
    for r in range(n):
        for g in range(groups):
            s, s0 = float(scale[r, g, 0]), float(tuned.scale[r, g, 0])
            z = 0.0 if zero is None else float(zero[r, g, 0])
            for i in range(size):
                q, value, out = float(codes[r, g, i]), float(tuned.weight[r, g, i]), float(outer[r, g, i])
                shift = z if grid.zero_point == "int" else 0.0 if zero is None else grid.mid
                base = z if grid.zero_point == "float" else 0.0
                place = (value - base) / s + shift + 0.3
                inside = grid.qmin <= round(place) <= grid.qmax
                expected[0][r, g, i] = out * s if inside else 0
                free = (value - base) / s if inside else 0.0
                expected[1][r, g, 0] += out * s0 * (q - shift - free)
                if grid.zero_point == "float":
                    expected[2][r, g, 0] += out * s0 * (0.0 if inside else 1.0)
                elif grid.zero_point == "int" and 0 < z < grid.qmax:
                    expected[2][r, g, 0] += out * s * (0.0 if inside else -1.0)
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)


def test_one_step_of_signsgd(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    """Against the same step taken by hand, with the block's gradient by autograd through dequantized weights."""
    work = block_work(tiny_llama(torch.float32), batches=1)
    start = quantized(work, GRIDS["float zero"])
    weights, report = tune(
        Tuning(work, start, work.targets),
        TuneOptions(steps=1, batch=8, rounding_rate=0.25, range_rate=0.0, check_every=1, relative=False),
    )
    for name, linear in work.linears.items():
        linear.weight.data, start[name] = start[name].dequantize(), start[name]
        linear.weight.requires_grad_()
    loss = (work.run(work.inputs[0]) - work.targets[0]).square().mean()
    loss.backward()
    assert report.first_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    original = tiny_llama(torch.float32).blocks[0]
    changed = 0
    for name, linear in work.linears.items():
        tuned = TunedWeight(original.get_submodule(name).weight, start[name])
        assert linear.weight.grad is not None
        gradient = linear.weight.grad.reshape(tuned.shape) * tuned.scale
        tuned.rounding.copy_(-0.25 * gradient.sign())
        settled = gradient.abs() > 1e-6 * gradient.abs().max()
        same = tuned.quantized().codes() == weights[name].codes()
        if report.step:
            assert bool(same[settled.reshape(same.shape)].all())
        changed += int((weights[name].codes() != start[name].codes()).sum())
    assert report.changed == pytest.approx(changed / sum(linear.weight.numel() for linear in work.linears.values()))


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "sign") for name in GRIDS), ("float zero", "adam")], ids=[*GRIDS, "adam"]
)
def test_learning_lowers_the_loss_and_repeats_itself(
    tiny_llama: Callable[..., Any], block_work: Callable[..., Any], name: str, optimizer: Any
) -> None:
    work, grid = block_work(tiny_llama(torch.float32)), GRIDS[name]
    start = quantized(work, replace(grid, bits=3) if grid.group_size else grid)
    before = {name: parameter.clone() for name, parameter in work.module.named_parameters()}
    options = TuneOptions(16, 4, rounding_rate=0.03, range_rate=0.001, optimizer=optimizer, check_every=8)
    weights, report = tune(Tuning(work, start, work.targets), options)
    assert report.loss < (0.9 if grid.group_size else 1.0) * report.first_loss
    assert report.step > 0
    for name, linear in work.linears.items():
        linear.weight.data = weights[name].dequantize()
        assert weights[name].grid == start[name].grid
    inputs, targets = torch.cat(work.inputs)[[0]], torch.cat(work.targets)[[0]]  # the one of 12 windows that is held out
    importance = 1 / targets.detach().square().mean(-1)
    squares = (work.run(inputs) - targets).detach().square().mean(-1)
    mean = (1 / torch.cat(work.targets).detach().square().mean(-1)).mean()
    assert float((squares * importance).mean() / mean) == pytest.approx(report.loss, rel=1e-4)
    for name, linear in work.linears.items():
        linear.weight.data = before[f"{name}.weight"]
    again, _ = tune(Tuning(work, start, work.targets), options)
    assert all(torch.equal(a, b) for name in again for a, b in zip(again[name].tensors, weights[name].tensors, strict=True))
    assert all(torch.equal(before[name], parameter) for name, parameter in work.module.named_parameters())
    assert all("forward" not in vars(linear) for linear in work.linears.values())


def test_start_is_kept_when_nothing_is_better(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    work = block_work(tiny_llama(torch.float32))
    start = quantized(work, GRIDS["per channel"])
    for name, linear in work.linears.items():
        linear.weight.data = start[name].dequantize()
    targets = [work.run(h).detach() for h in work.inputs]
    weights, report = tune(Tuning(work, start, targets), TuneOptions(steps=3, rounding_rate=0.4))
    assert (report.step, report.changed) == (0, 0.0)
    assert all(weights[name] is start[name] for name in start)


def test_metric_and_rounded_inputs_are_in_the_loss(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    work = block_work(tiny_llama(torch.float32), batches=2)  # six windows: nothing is held out
    start = quantized(work, GRIDS["per channel"])
    root = torch.randn(48, 48, generator=torch.Generator().manual_seed(4))
    options = TuneOptions(steps=1, rounding_rate=1e-6, relative=False)
    _, plain = tune(Tuning(work, start, work.targets), options)
    _, weighted = tune(Tuning(work, start, work.targets, metric=root @ root.T), options)
    errors = []
    for name, linear in work.linears.items():
        linear.weight.data = start[name].dequantize()
    for h, y in zip(work.inputs, work.targets, strict=True):
        errors.append((work.run(h) - y).detach().reshape(-1, 48))
    error = torch.cat(errors)
    assert plain.first_loss == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert weighted.first_loss == pytest.approx(float((error @ root).square().mean()), rel=1e-4)
    grid = ActivationGrid(symmetric=True)
    _, noisy = tune(Tuning(work, start, work.targets, dict.fromkeys(start, grid)), options)
    assert noisy.first_loss > 1.5 * plain.first_loss


def test_refusals(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    work = block_work(tiny_llama(torch.float32))
    start = quantized(work, GRIDS["symmetric"])
    with pytest.raises(SchemeError, match="a target for every input"):
        tune(Tuning(work, start, work.targets[:-1]), TuneOptions())
    with pytest.raises(SchemeError, match="at least one window"):
        tune(Tuning(replace_inputs(work, []), start, []), TuneOptions())
    with pytest.raises(UsageError, match="learns nothing"):
        tune(Tuning(work, start, work.targets), TuneOptions(rounding_rate=0.0, range_rate=0.0))
    with pytest.raises(SchemeError, match="not finite"):
        tune(Tuning(work, start, [target * float("nan") for target in work.targets]), TuneOptions())
    with pytest.raises(UsageError, match="floating"):
        TunedWeight(weight(), QuantizedWeight.from_float(weight()))
    with pytest.raises(UsageError, match="at least 1"):
        TuneOptions(steps=0)
    with pytest.raises(UsageError, match="must not be negative"):
        TuneOptions(range_rate=-1.0)
    assert tune(Tuning(work, {}, work.targets), TuneOptions())[0] == {}


def replace_inputs(work: Any, inputs: list[Tensor]) -> Any:
    return type(work)(**{**vars(work), "inputs": inputs})
