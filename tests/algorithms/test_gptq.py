"""GPTQ against the explicit algorithm it is a fast form of, and the promises of its docstring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.algorithms.gptq import GptqOptions, gptq
from llmq.algorithms.rtn import choose_scales, numbers_of, quantize_rtn, round_to_grid
from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid

GRIDS = {
    "float zero": IntGrid(4, 16, symmetric=False, zero_point="float", scale_dtype="bfloat16"),
    "int zero": IntGrid(4, 16, symmetric=False, zero_point="int", scale_dtype="bfloat16"),
    "symmetric": IntGrid(4, 16, symmetric=True, zero_point="none", scale_dtype="bfloat16"),
    "per channel": IntGrid(3, None, symmetric=True, zero_point="none", scale_dtype="float32"),
    "8 bits": IntGrid(8, 16, symmetric=False, zero_point="int", scale_dtype="float32"),
}


def problem(n: int, k: int, seed: int = 0, rows: int = 256) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of very different sizes, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(k, k, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, k, dtype=torch.float64)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) * 0.05
    return weight, 2 / rows * x.T @ x


def loss(weight: Tensor, numbers: Tensor, hessian: Tensor) -> Tensor:
    """Hessian-weighted loss of every row, [N]."""
    error = weight.double() - numbers.double()
    return ((error @ hessian.double()) * error).sum(1)


def obq(weight: Tensor, hessian: Tensor, grid: IntGrid, options: GptqOptions) -> Tensor:
    """Optimal brain quantization in a fixed order: round a column, solve for the rest, remove it from the inverse. O(K^3)."""
    n, k = weight.shape
    scale, zero = choose_scales(weight, grid, mapping=options.mapping)
    h = hessian.clone()
    h.diagonal().add_(options.damping * hessian.diagonal().mean())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if options.act_order else torch.arange(k)
    inverse = torch.linalg.inv(h)
    work, codes = weight.clone(), torch.zeros(n, k, dtype=torch.int64)
    done = torch.zeros(k, dtype=torch.bool)
    for column in order.tolist():
        group = column // (grid.group_size or k)
        s, z = scale[:, group : group + 1], None if zero is None else zero[:, group : group + 1]
        q = round_to_grid(work[:, column : column + 1], grid, s, z)
        codes[:, column] = q[:, 0].long()
        error = work[:, column] - numbers_of(q, grid, s, z, torch.float64)[:, 0]
        done[column] = True
        update = torch.outer(error / inverse[column, column], inverse[column])
        work[:, ~done] -= update[:, ~done]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, :] = 0
        inverse[:, column] = 0
    return codes


def obq_or_rtn(weight: Tensor, hessian: Tensor, grid: IntGrid, options: GptqOptions) -> Tensor:
    """OBQ's codes, but for rows in which rounding to nearest loses less."""
    codes = obq(weight, hessian, grid, options)
    scale, zero = choose_scales(weight, grid, mapping=options.mapping)
    nearest = round_to_grid(weight, grid, scale, zero).long()
    worse = loss(weight, numbers_of(codes, grid, scale, zero, torch.float64), hessian) > loss(
        weight, numbers_of(nearest, grid, scale, zero, torch.float64), hessian
    )
    codes[worse] = nearest[worse]
    return codes


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in order"])
@pytest.mark.parametrize(("n", "k"), [(8, 16), (5, 32), (16, 48)])
def test_equals_naive_reference(grid: IntGrid, act_order: bool, n: int, k: int) -> None:
    for seed in range(2):
        weight, hessian = problem(n, k, seed)
        options = GptqOptions(act_order=act_order)
        quantized, _ = gptq(weight, hessian, grid, options)
        assert torch.equal(quantized.codes().long(), obq_or_rtn(weight, hessian, grid, options))


@pytest.mark.parametrize("act_order", [True, False])
def test_block_size_changes_nothing(act_order: bool) -> None:
    weight, hessian = problem(24, 144)
    grid = GRIDS["float zero"]
    codes = [
        gptq(weight, hessian, grid, GptqOptions(block_size=size, act_order=act_order))[0].codes()
        for size in (1, 16, 100, 128, 144)
    ]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_identity_hessian_is_round_to_nearest(grid: IntGrid) -> None:
    weight = problem(16, 64)[0].float()
    quantized, report = gptq(weight, 3 * torch.eye(64), grid, GptqOptions())
    assert torch.equal(quantized.qdata, quantize_rtn(weight, grid).qdata)
    assert report.loss == pytest.approx(report.rtn_loss)
    assert report.loss == pytest.approx(3 * (weight - quantized.dequantize()).square().sum().item(), rel=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from(sorted(GRIDS)), st.booleans(), st.sampled_from([2, 16, 200]))
def test_loss_is_never_above_round_to_nearest(seed: int, name: str, act_order: bool, rows: int) -> None:
    grid = GRIDS[name]
    weight, hessian = problem(12, 48, seed, rows)
    weight, hessian = weight.float(), hessian.float()
    quantized, report = gptq(weight, hessian, grid, GptqOptions(act_order=act_order))
    mine = loss(weight, quantized.dequantize(), hessian)
    nearest = loss(weight, quantize_rtn(weight, grid).dequantize(), hessian)
    scale = nearest.sum() + 0.01 * hessian.diagonal().mean() * (weight - quantized.dequantize()).square().sum()
    assert (mine <= nearest + 1e-5 * scale).all()
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss <= report.rtn_loss
    assert report.loss == pytest.approx(mine.sum().item(), rel=1e-4, abs=1e-5 * scale.item())
    assert report.rtn_loss == pytest.approx(nearest.sum().item(), rel=1e-4, abs=1e-5 * scale.item())


def test_it_is_worth_it() -> None:
    weight, hessian = problem(64, 256, rows=2048)
    _, report = gptq(weight.float(), hessian.float(), GRIDS["float zero"], GptqOptions())
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss < 0.6 * report.rtn_loss


def test_permuting_the_columns_of_a_group_permutes_the_codes() -> None:
    weight, hessian = problem(16, 64)
    grid = GRIDS["int zero"]
    order = torch.cat([16 * group + torch.randperm(16) for group in (2, 0, 3, 1)])
    quantized, _ = gptq(weight, hessian, grid, GptqOptions())
    permuted, _ = gptq(weight[:, order], hessian[order][:, order], grid, GptqOptions())
    assert torch.equal(permuted.codes(), quantized.codes()[:, order])


def test_scales_are_those_of_the_original_weight() -> None:
    weight, hessian = problem(8, 64)
    for grid in GRIDS.values():
        quantized, _ = gptq(weight, hessian, grid, GptqOptions())
        nearest = quantize_rtn(weight, grid)
        assert quantized.scale is not None
        assert nearest.scale is not None
        assert torch.equal(quantized.scale, nearest.scale)
        assert (quantized.zero_point is None) == (nearest.zero_point is None)
        if quantized.zero_point is not None and nearest.zero_point is not None:
            assert torch.equal(quantized.zero_point, nearest.zero_point)


def test_dead_columns_are_rounded_to_nearest_and_leave_the_others_alone() -> None:
    weight, hessian = problem(8, 32)
    dead = torch.tensor([0, 7, 31])
    hessian[dead] = 0
    hessian[:, dead] = 0
    grid = GRIDS["symmetric"]
    quantized, report = gptq(weight, hessian, grid, GptqOptions())
    assert report.dead_columns == 3
    assert report.fallback is None
    assert torch.equal(quantized.codes()[:, dead], quantize_rtn(weight, grid).codes()[:, dead])
    other = weight.clone()
    other[:, dead] = weight[:, dead] * 0.5 + 0.001  # keeps the groups' ranges, which other columns set
    scale, _ = choose_scales(weight, grid)
    assert torch.equal(choose_scales(other, grid)[0], scale)
    live = torch.tensor([column for column in range(32) if column not in dead.tolist()])
    assert torch.equal(gptq(other, hessian, grid, GptqOptions())[0].codes()[:, live], quantized.codes()[:, live])


def test_all_columns_dead() -> None:
    weight, _ = problem(8, 32)
    quantized, report = gptq(weight, torch.zeros(32, 32), GRIDS["symmetric"], GptqOptions())
    assert (report.dead_columns, report.loss, report.fallback) == (32, 0.0, None)
    assert torch.equal(quantized.qdata, quantize_rtn(weight, GRIDS["symmetric"]).qdata)


def indefinite(k: int, depth: float) -> tuple[Tensor, Tensor]:
    """A Hessian whose smallest eigenvalue is minus `depth` times its mean diagonal, as bad sums produce."""
    weight, hessian = problem(8, k)
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -depth * values[1:].mean()
    return weight, vectors @ torch.diag(values) @ vectors.T


def test_damping_climbs_until_the_factorisation_succeeds() -> None:
    weight, hessian = indefinite(32, 0.05)
    quantized, report = gptq(weight, hessian, GRIDS["symmetric"], GptqOptions(damping=0.01))
    assert report.tried == pytest.approx((0.01, 0.1))
    assert report.damping == pytest.approx(0.1)
    assert report.fallback is None
    again, _ = gptq(weight, hessian, GRIDS["symmetric"], GptqOptions(damping=0.1))
    assert torch.equal(quantized.qdata, again.qdata)


def test_no_damping_climbs_too() -> None:
    x = torch.randn(4, 32, dtype=torch.float64)  # rank 4
    _, report = gptq(torch.randn(8, 32), x.T @ x, GRIDS["symmetric"], GptqOptions(damping=0.0))
    assert report.tried[0] == 0.0
    assert len(report.tried) > 1
    assert report.fallback is None


def test_the_ladder_ends_in_round_to_nearest() -> None:
    weight, hessian = indefinite(32, 100.0)
    quantized, report = gptq(weight, hessian, GRIDS["symmetric"], GptqOptions())
    assert report.tried == pytest.approx((0.01, 0.1, 1.0, 10.0))
    assert report.fallback is not None
    assert "not positive definite" in report.fallback
    assert report.rtn_rows == 8
    assert report.loss == report.rtn_loss
    assert torch.equal(quantized.qdata, quantize_rtn(weight, GRIDS["symmetric"]).qdata)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite(bad: float) -> None:
    weight, hessian = problem(8, 32)
    hessian[3, 5] = hessian[5, 3] = bad
    quantized, report = gptq(weight, hessian, GRIDS["symmetric"], GptqOptions())
    assert report.fallback == "the Hessian is not finite"
    assert (report.loss, report.rtn_loss, report.damping) == (None, None, None)
    assert torch.equal(quantized.qdata, quantize_rtn(weight, GRIDS["symmetric"]).qdata)


def test_fp32_is_as_good_as_fp64() -> None:
    weight, hessian = problem(32, 256, rows=300)
    grid = GRIDS["float zero"]
    narrow, report32 = gptq(weight.float(), hessian.float(), grid, GptqOptions())
    wide, report64 = gptq(weight.float().double(), hessian.float().double(), grid, GptqOptions())
    # a last bit can turn a code over, and every later column then takes another way: no worse, but another
    assert report32.loss == pytest.approx(report64.loss, rel=0.1)
    assert report32.rtn_loss == pytest.approx(report64.rtn_loss, rel=1e-3)
    assert loss(weight, narrow.dequantize(), hessian).sum().item() == pytest.approx(report32.loss, rel=1e-3)
    assert loss(weight, wide.dequantize(torch.float64), hessian).sum().item() == pytest.approx(report64.loss, rel=1e-6)


def test_bfloat16_weight_and_both_mappings() -> None:
    weight, hessian = problem(8, 32)
    grid = GRIDS["symmetric"]
    for mapping in (MappingType.SYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR):
        quantized, _ = gptq(weight.bfloat16(), hessian.float(), grid, GptqOptions(mapping=mapping))
        scale, _ = choose_scales(weight.bfloat16(), grid, mapping=mapping)
        assert quantized.scale is not None
        assert torch.equal(quantized.scale, scale)


def test_arguments_are_left_alone() -> None:
    weight, hessian = problem(8, 32)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, GRIDS["symmetric"], GptqOptions())
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_wrong_arguments() -> None:
    weight, hessian = problem(8, 32)
    with pytest.raises(ShapeError, match=r"needs a Hessian \[32, 32\], got \[16, 16\]"):
        gptq(weight, hessian[:16, :16], GRIDS["symmetric"], GptqOptions())
    with pytest.raises(UsageError, match="float32 or float64"):
        gptq(weight, hessian.bfloat16(), GRIDS["symmetric"], GptqOptions())
    with pytest.raises(ShapeError, match="cannot be cut into groups"):
        gptq(weight[:, :24], hessian[:24, :24], GRIDS["symmetric"], GptqOptions())
    with pytest.raises(UsageError, match="damping"):
        GptqOptions(damping=-0.1)
    with pytest.raises(UsageError, match="block_size"):
        GptqOptions(block_size=0)
