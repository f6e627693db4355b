"""AWQ: its scales are the paper's, its searches find the best of what they try, and blocks keep their function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms.awq import AwqOptions, awq_, awq_scale, may_clip, search_clip
from llmq.algorithms.folding import fold_, fold_pairs
from llmq.algorithms.rtn import quantize_rtn
from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid

GRIDS = {
    "float zero": IntGrid(4, 16, symmetric=False, zero_point="float", scale_dtype="bfloat16"),
    "int zero": IntGrid(3, 16, symmetric=False, zero_point="int", scale_dtype="bfloat16"),
    "symmetric": IntGrid(4, 16, symmetric=True, zero_point="none", scale_dtype="bfloat16"),
    "per channel": IntGrid(3, None, symmetric=True, zero_point="none", scale_dtype="float32"),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def output_error(work: Any, part: str, plain: dict[str, Tensor], rounded: dict[str, Tensor]) -> float:
    """Squared error of a part's output when some weights are others, relative to the stream: by running the block, twice."""
    outputs: list[Tensor] = []
    streams: list[Tensor] = []
    handle = work.module.get_submodule(part).register_forward_hook(lambda *call: outputs.append(call[2].detach()))
    for weights in (plain, rounded):
        for name, weight in weights.items():
            work.linears[name].weight.data = weight
        streams += [work.run(h).detach() for h in work.inputs]
    handle.remove()
    for name, weight in plain.items():
        work.linears[name].weight.data = weight
    half = len(outputs) // 2
    importance = 1 / torch.cat(streams[:half]).square().mean(-1)
    squares = (torch.cat(outputs[:half]) - torch.cat(outputs[half:])).square().mean(-1)
    return float((squares * importance).sum() / importance.sum())


@pytest.mark.parametrize("both", [True, False], ids=["both", "inputs"])
def test_finds_the_best_exponent(tiny_llama: Callable[..., Any], block_work: Callable[..., Any], both: bool) -> None:
    """Against trying every exponent on the whole block, with scales folded and weights rounded for real."""
    grid = GRIDS["float zero"]
    model = tiny_llama(torch.float32)
    work = block_work(model, layer=1)
    pair = fold_pairs(work.module)[2]
    names = pair.consumers
    rows: list[Tensor] = []
    handle = work.linears[names[0]].register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().reshape(-1, 48)))
    for h in work.inputs:
        work.run(h)
    handle.remove()
    x_mean = torch.cat(rows).abs().mean(0)
    weights = {name: work.linears[name].weight.detach().clone() for name in names}
    stacked = torch.cat(list(weights.values())).abs().reshape(-1, 3, 16)
    w_mean = (stacked / stacked.amax(2, keepdim=True)).reshape(-1, 48).mean(0)
    errors = {None: output_error(work, "mlp", weights, {n: quantize_rtn(w, grid).dequantize() for n, w in weights.items()})}
    for index in range(8):
        scale = x_mean ** (index / 8) / (w_mean ** (1 - index / 8) if both else 1)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = {name: quantize_rtn(weight * scale, grid).dequantize() / scale for name, weight in weights.items()}
        errors[index / 8] = output_error(work, "mlp", weights, rounded)
    reports = awq_(work, grid, None, AwqOptions(candidates=8, scales="both" if both else "inputs"))
    report = reports[2]
    assert report.producer == pair.producer
    assert report.plain_error == pytest.approx(errors[None], rel=1e-4)
    assert report.error == pytest.approx(min(errors.values()), rel=1e-4)
    assert report.exponent == min(errors, key=lambda power: errors[power])


@grids
def test_block_keeps_its_function_and_loses_less(
    tiny_llama: Callable[..., Any], block_work: Callable[..., Any], grid: IntGrid
) -> None:
    work = block_work(tiny_llama(torch.float32))
    reports = awq_(work, grid, None, AwqOptions(candidates=5))
    assert [report.producer for report in reports] == [pair.producer for pair in fold_pairs(work.module)]
    assert all(report.error <= report.plain_error for report in reports)
    assert reports[0].exponent is not None  # the norm has a channel 16 times larger than the others
    assert reports[0].error < (0.9 if grid.group_size else 1.0) * reports[0].plain_error
    for h, y in zip(work.inputs, work.targets, strict=True):
        torch.testing.assert_close(work.run(h), y, rtol=1e-4, atol=1e-4)


def test_scale_is_normalised_and_finite() -> None:
    x_mean, w_mean = torch.tensor([4.0, 0.0, 0.5]), torch.tensor([0.5, 0.25, 0.0])
    for power in (0.0, 0.4, 1.0):
        for weights in (w_mean, None):
            scale = awq_scale(x_mean, weights, power)
            assert torch.isfinite(scale).all()
            assert (scale > 0).all()
            assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(awq_scale(x_mean, None, 0.0), torch.ones(3))
    ratio = awq_scale(x_mean, w_mean, 0.5)
    assert float(ratio[0] / ratio[2]) == pytest.approx((4 / 0.5) ** 0.5 * (0.5e-4 / 0.5) ** 0.5, rel=1e-4)


@grids
@pytest.mark.parametrize(("n", "k"), [(3, 16), (5, 48)])
def test_clip_against_loops(grid: IntGrid, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) ** 3 * 0.1
    x = torch.randn(200, k, generator=generator, dtype=torch.float64) @ torch.randn(
        k, k, generator=generator, dtype=torch.float64
    )
    hessian = 2 / 200 * x.T @ x
    mapping = None if not grid.symmetric else MappingType.SYMMETRIC_NO_CLIPPING_ERR
    clipped = search_clip(weight, hessian, grid, mapping=mapping, steps=7)
    size = grid.group_size or k
    for row in range(n):
        for start in range(0, k, size):
            part = weight[row, start : start + size]
            inputs = x[:, start : start + size]
            losses = []
            for step in range(7):
                share = 1 - 0.5 * step / 7
                tried = torch.stack([min(max(w, part.min() * share), part.max() * share) for w in part])
                small = IntGrid(grid.bits, None, grid.symmetric, grid.zero_point, grid.scale_dtype)
                numbers = quantize_rtn(tried[None], small, mapping=mapping).dequantize(torch.float64)[0]
                losses.append((float(2 / 200 * ((numbers - part) @ inputs.T).square().sum()), tried))
            best, tried = min(losses, key=lambda pair: pair[0])
            got = clipped[row, start : start + size]
            numbers = quantize_rtn(got[None], small, mapping=mapping).dequantize(torch.float64)[0]
            loss = float(2 / 200 * ((numbers - part) @ inputs.T).square().sum())
            assert loss == pytest.approx(best, rel=1e-9)
    assert not torch.equal(clipped, weight)


def test_what_is_clipped() -> None:
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
    assert [may_clip(name) for name in names] == [False, False, True, True, True]


def test_refusals() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        AwqOptions(candidates=0)
    weight, grid = torch.randn(4, 32), GRIDS["symmetric"]
    with pytest.raises(ShapeError, match=r"needs a Hessian \[32, 32\]"):
        search_clip(weight, torch.eye(31), grid)
    with pytest.raises(ShapeError, match="does not fit"):
        search_clip(torch.randn(4, 33), torch.eye(33), grid)
    with pytest.raises(UsageError, match="at least 1 range"):
        search_clip(weight, torch.eye(32), grid, steps=0)


def test_only_what_is_quantized_is_touched(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    work = block_work(tiny_llama(torch.float32))
    pair = fold_pairs(work.module)[3]
    fold_(work.module, pair, torch.logspace(-1, 1, pair.channels))
    before = {name: parameter.clone() for name, parameter in work.module.named_parameters()}
    work.linears = {name: linear for name, linear in work.linears.items() if name in {"mlp.up_proj", "mlp.down_proj"}}
    reports = awq_(work, GRIDS["symmetric"], None, AwqOptions(candidates=4))
    assert [report.producer for report in reports] == ["mlp.up_proj"]
    changed = {name for name, parameter in work.module.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    assert isinstance(work.linears["mlp.up_proj"], nn.Linear)
