"""Weights for rounded inputs: statistics are those of what will come, and the block's output is nearer for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.algorithms.fisher import FactorSums
from llmq.algorithms.rounded_inputs import (
    InputOptions,
    quantize_for_rounded_inputs,
    quantized_forward,
    rounded,
    rounding_cost,
)
from llmq.algorithms.rounding import RoundingOptions, round_linear
from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.simulate import replaced
from llmq.algorithms.smoothquant import static_scale
from llmq.algorithms.statistics import Statistics
from llmq.errors import UsageError
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat

WEIGHT = IntGrid(8, None, symmetric=True, zero_point="none", scale_dtype="float32")
DYNAMIC, STATIC = ActivationGrid(symmetric=True), ActivationGrid(symmetric=True, static=True)
GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
ROUNDING = RoundingOptions(correction=1.0, sweeps=0, damping=1e-3)


def start(work: Any) -> Any:
    return {name: quantize_rtn(linear.weight.detach(), WEIGHT) for name, linear in work.linears.items()}


def block_error(work: Any, weights: Any, grid: ActivationGrid) -> float:
    forwards = {name: quantized_forward(work.linears[name], weight, grid) for name, weight in weights.items()}
    with torch.no_grad(), replaced(work.module, forwards):
        return sum(
            float(((work.run(h) - y).square().mean(-1) / y.square().mean(-1)).mean())
            for h, y in zip(work.inputs, work.targets, strict=True)
        )


def test_last_group_against_its_definition(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    """down_proj's weight from the inputs that the block has with everything before it quantized, gathered by hand."""
    work = block_work(tiny_llama(torch.float32))
    weights = quantize_for_rounded_inputs(work, GROUPS, start(work), LinearFormat(WEIGHT, DYNAMIC), InputOptions(ROUNDING))
    before = {name: quantized_forward(work.linears[name], weights[name], DYNAMIC) for name in weights if "down" not in name}
    rows: list[Tensor] = []
    streams: list[Tensor] = []
    down = work.linears["mlp.down_proj"]
    handle = down.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 80)))
    with torch.no_grad(), replaced(work.module, before):
        streams += [work.run(h).double().reshape(-1, 48) for h in work.inputs[:-1]]  # the last is held out
    handle.remove()
    importance = 1 / torch.cat(streams).square().mean(1, keepdim=True)
    importance /= importance.mean()
    x = torch.cat(rows).double()
    x_hat = rounded(torch.cat(rows), DYNAMIC, None).double()
    noise = torch.diag(2 / len(x) * ((x - x_hat).square() * importance).sum(0))
    statistics = Statistics((2 / len(x) * (x * importance).T @ x + noise).float(), -noise.float())
    expected, _ = round_linear(work.linears["mlp.down_proj"].weight.detach(), statistics, WEIGHT, ROUNDING)
    same = expected.codes() == weights["mlp.down_proj"].codes()
    assert float(same.float().mean()) > 0.99  # sums in another order move a few codes
    y = x @ work.linears["mlp.down_proj"].weight.detach().double().T
    error, plain = (x_hat @ found["mlp.down_proj"].dequantize().double().T - y for found in (weights, start(work)))
    assert float((error.square() * importance).mean()) < float((plain.square() * importance).mean())


@pytest.mark.parametrize("grid", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_block_is_nearer_to_its_target(
    tiny_llama: Callable[..., Any], block_work: Callable[..., Any], grid: ActivationGrid
) -> None:
    work = block_work(tiny_llama(torch.float32), batches=12)
    form = LinearFormat(WEIGHT, grid)
    before = {name: parameter.clone() for name, parameter in work.module.named_parameters()}
    plain = quantize_for_rounded_inputs(work, GROUPS, start(work), form, InputOptions(None))
    better = quantize_for_rounded_inputs(work, GROUPS, start(work), form, InputOptions(ROUNDING))
    assert all(torch.equal(before[name], parameter) for name, parameter in work.module.named_parameters())
    for name, weight in plain.items():
        assert torch.equal(weight.qdata, start(work)[name].qdata)
        assert (weight.input_scale is None) == (not grid.static)
    assert block_error(work, better, grid) < block_error(work, plain, grid)


def test_little_text_is_not_learned_by_heart(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    """One window of 24 tokens says nothing about 80 inputs: what is computed from it is worse on others, and not kept."""
    work = block_work(tiny_llama(torch.float32), batches=8)
    everything, work.inputs = work.inputs, [work.inputs[0][:1], work.inputs[1]]
    form = LinearFormat(WEIGHT, DYNAMIC)
    weights = quantize_for_rounded_inputs(work, GROUPS, start(work), form, InputOptions(ROUNDING))
    work.inputs = everything
    assert block_error(work, weights, DYNAMIC) < 1.05 * block_error(work, start(work), DYNAMIC)
    kept = [name for name, weight in start(work).items() if torch.equal(weight.qdata, weights[name].qdata)]
    assert kept


def test_static_scale_is_shared_and_found_from_quantized_inputs(
    tiny_llama: Callable[..., Any], block_work: Callable[..., Any]
) -> None:
    work = block_work(tiny_llama(torch.float32))
    weights = quantize_for_rounded_inputs(work, GROUPS, start(work), LinearFormat(WEIGHT, STATIC), InputOptions(None))
    for group in GROUPS:
        scales = [weights[name].input_scale for name in group]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
    rows: list[Tensor] = []
    streams: list[Tensor] = []
    name = "self_attn.o_proj"
    forwards = {other: quantized_forward(work.linears[other], weights[other], STATIC) for other in GROUPS[0]}
    handle = work.linears[name].register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 48)))
    with torch.no_grad(), replaced(work.module, forwards):
        streams += [work.run(h).reshape(-1, 48) for h in work.inputs]
    handle.remove()
    importance = 1 / torch.cat(streams).square().mean(1)
    expected = static_scale(torch.cat(rows), [work.linears[name].weight], importance)
    torch.testing.assert_close(weights[name].input_scale, expected)


def test_quantized_forward_keeps_the_bias(tiny_llama: Callable[..., Any]) -> None:
    linear = tiny_llama(torch.float32, mlp_bias=True).blocks[0].mlp.down_proj
    weight = quantize_rtn(linear.weight.detach(), WEIGHT)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / 127
    expected = F.linear((x / scale).round() * scale, weight.dequantize(), linear.bias)
    torch.testing.assert_close(quantized_forward(linear, weight, DYNAMIC)(x), expected, rtol=1e-5, atol=1e-6)


def test_refuses_formats_without_rounded_inputs(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    work = block_work(tiny_llama(torch.float32))
    with pytest.raises(UsageError, match="inputs are rounded by formats"):
        quantize_for_rounded_inputs(work, GROUPS, start(work), LinearFormat(WEIGHT), InputOptions(ROUNDING))


@pytest.mark.parametrize("grid", [DYNAMIC, STATIC])
def test_cost_of_rounding_inputs_is_the_second_order_term(grid: ActivationGrid) -> None:
    """Where inputs have one length and gradients nothing to do with them, the estimate is exact: E[(g . W d)^2] / 2."""
    generator = torch.Generator().manual_seed(3)
    n, k, rows = 5, 24, 7
    weight = quantize_rtn(torch.randn(n, k, generator=generator), WEIGHT)
    x = torch.randn(rows, k, generator=generator) * torch.randn(k, generator=generator).exp()
    x *= 3 / x.norm(dim=1, keepdim=True)
    if grid.static:
        weight = replace(weight, input_scale=torch.tensor([0.02]))
    g = torch.randn(11, n, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 3.0, 0.0])
    sums = FactorSums((n, k), torch.zeros((), dtype=torch.float64))
    sums.add(x.double().repeat(len(g), 1), g.double().repeat_interleave(rows, 0))
    factors = sums.finish()
    d = (rounded(x, grid, weight.input_scale) - x).double()
    exact = ((g.double() @ weight.dequantize().double() @ d.T) ** 2).mean() / 2
    cost = rounding_cost(weight, grid, x, factors.inputs.float(), factors.outputs.float())
    assert cost == pytest.approx(float(exact), rel=1e-5)
    assert cost > 0
    assert rounding_cost(weight, grid, torch.zeros(2, k), factors.inputs.float(), factors.outputs.float()) == 0
