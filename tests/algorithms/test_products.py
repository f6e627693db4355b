"""Products in bf16: what they may be off by, and that nothing that is rounded with them is worse for it."""

import pytest
import torch

from llmq.algorithms import products
from llmq.algorithms.metric import Metric, damped
from llmq.algorithms.products import is_narrow, narrow_passes, narrowed, product
from llmq.algorithms.rounding import RoundingOptions, round_linear
from llmq.algorithms.statistics import Statistics
from llmq.numerics.grid import IntGrid

CPU = torch.device("cpu")
GRIDS = [
    IntGrid(4, 32, symmetric=False, zero_point="float", scale_dtype="bfloat16"),
    IntGrid(4, 32, symmetric=False, zero_point="int", scale_dtype="bfloat16"),
    IntGrid(3, None, symmetric=True, zero_point="none", scale_dtype="bfloat16"),
]


@pytest.fixture
def fast_bf16(monkeypatch):
    """A machine that multiplies bf16 faster, for which nothing is too small."""
    monkeypatch.setattr(products, "has_bf16_dot", lambda: True)
    monkeypatch.setattr(products, "LEAST_INNER", 1)


def test_which_products_are_narrow(monkeypatch):
    monkeypatch.setattr(products, "has_bf16_dot", lambda: True)
    assert is_narrow(1024, torch.float32, CPU)
    assert not is_narrow(1023, torch.float32, CPU)
    assert not is_narrow(4096, torch.float64, CPU)
    monkeypatch.setattr(products, "has_bf16_dot", lambda: False)
    assert not is_narrow(4096, torch.float32, CPU)
    assert is_narrow(4096, torch.float32, torch.device("cuda"))


def test_what_is_wide_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(products, "has_bf16_dot", lambda: False)
    left, right = torch.randn(3, 2048), torch.randn(2048, 5)
    assert narrowed(left, 2048) is left
    assert torch.equal(product(left, right), left @ right)
    with narrow_passes(2048, CPU):
        assert torch.nn.functional.linear(left, right.T).dtype == torch.float32


@pytest.mark.usefixtures("fast_bf16")
@pytest.mark.parametrize("which", ["neither", "left", "right", "both"])
def test_a_narrow_product_is_within_the_bound_of_its_operands(which):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(7, 300, generator=generator) * torch.logspace(-6, 6, 7)[:, None]
    right = torch.randn(300, 11, generator=generator) - 0.5
    given = left.bfloat16() if which in ("left", "both") else left, right.bfloat16() if which in ("right", "both") else right
    found = product(*given)
    assert found.dtype == torch.float32
    # each operand is off by half an ulp of 8 bits, the sum by its fp32 additions, and it is rounded once more
    half_ulp = 2.0**-9
    terms = left.double().abs() @ right.double().abs()
    exact = left.double() @ right.double()
    bound = terms * ((1 + half_ulp) ** 2 - 1 + 302 * 2.0**-24) * (1 + half_ulp) + exact.abs() * half_ulp
    assert ((found - exact).abs() <= bound).all()
    assert not torch.equal(found, left @ right)  # it is really narrow


@pytest.mark.usefixtures("fast_bf16")
def test_blocks_compute_in_bf16_on_parameters_that_stay():
    linear = torch.nn.Linear(64, 8, bias=False)
    x = torch.randn(4, 64)
    with torch.no_grad(), narrow_passes(64, CPU):
        assert linear(x).dtype == torch.bfloat16
        assert torch.nn.functional.rms_norm(x, (64,)).dtype == torch.float32
    assert linear.weight.dtype == torch.float32


@pytest.mark.parametrize("grid", GRIDS, ids=["float zero", "int zero", "per channel"])
@pytest.mark.parametrize("metric", ["inputs", "fisher"])
def test_rounding_loses_no_more_by_them(grid, metric, fast_bf16, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    n, k = 48, 192
    weight = torch.randn(n, k, generator=generator) * 0.02
    mixing = torch.randn(24, k, generator=generator)  # inputs that go together, so that there is something to make up for
    x = torch.randn(2000, 24, generator=generator) @ mixing + torch.randn(2000, k, generator=generator)
    out = torch.randn(500, n, generator=generator) + torch.randn(500, 1, generator=generator)
    hessian, outputs = 2 / 2000 * x.T @ x, out.T @ out / 500
    upstream = 0.02 * hessian * torch.randn(k, k, generator=generator)
    statistics = Statistics(hessian, upstream, hessian, outputs)
    options = RoundingOptions(sweeps=2, correction=0.5, metric=metric, act_order=True)
    narrow, told = round_linear(weight, statistics, grid, options)
    monkeypatch.setattr(products, "LEAST_INNER", 1 << 30)
    wide, _ = round_linear(weight, statistics, grid, options)
    assert not torch.equal(narrow.dequantize(), wide.dequantize())
    exact = Metric(damped(hessian, 0.01).double(), damped(outputs, 0.01).double() if metric == "fisher" else None)
    target = weight.double()
    losses = [exact.loss(target - found.dequantize(torch.float64)) for found in (narrow, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert told.loss is not None
    assert told.rtn_loss is not None
    assert told.loss <= told.rtn_loss


@pytest.mark.usefixtures("fast_bf16")
def test_the_losses_that_are_told_are_those_of_the_error():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(900, 40, generator=generator) @ torch.randn(40, 700, generator=generator)
    hessian = damped(2 / 900 * x.T @ x, 0.01)
    error = torch.randn(20, 700, generator=generator) * 1e-3
    exact = (error.double() @ hessian.double() * error.double()).sum(1)
    assert torch.allclose(Metric(hessian).row_losses(error), exact, rtol=5e-3)
