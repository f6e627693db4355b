"""int4, int3, int2 and their GPTQ forms: grids, options and what reaches the algorithms."""

import pytest
import torch

from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.scale_search import SearchOptions, search_scales
from llmq.algorithms.statistics import Needs, Statistics
from llmq.numerics.grid import IntGrid
from llmq.schemes.registry import resolve

BITS = [2, 3, 4]


def inputs(k: int = 128, seed: int = 0) -> tuple[torch.Tensor, Statistics]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, k, generator=generator) @ torch.randn(k, k, generator=generator)
    hessian = x.T @ x / 200
    return torch.randn(16, k, generator=generator), Statistics(hessian, 0.05 * hessian, hessian, torch.eye(16))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", ["", "-gptq"])
def test_channel_is_one_group_a_row(bits: int, form: str) -> None:
    weight, statistics = inputs()
    resolved = resolve(f"int{bits}{form}", {"group_size": "channel", "symmetric": "true"})
    assert resolved.format.weight == IntGrid(bits, None, symmetric=True, zero_point="none", scale_dtype="bfloat16")
    quantized, _ = resolved.quantize_weight(weight, statistics, "x")
    assert quantized.scale is not None
    assert quantized.scale.shape == (16, 1)


@pytest.mark.parametrize("bits", BITS)
def test_search_is_an_option(bits: int) -> None:
    weight, statistics = inputs()
    grid = IntGrid(bits, 128, symmetric=False, zero_point="float", scale_dtype="bfloat16")
    plain, _ = resolve(f"int{bits}", {"search": "range"}).quantize_weight(weight, None, "x")
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors, quantize_rtn(weight, grid).tensors, strict=True))
    searched, _ = resolve(f"int{bits}").quantize_weight(weight, None, "x")
    assert (searched.dequantize() - weight).norm() < (plain.dequantize() - weight).norm()
    weighted, _ = resolve(f"int{bits}", {"search": "weighted"}).quantize_weight(weight, statistics, "x")
    scale, _ = search_scales(weight, grid, statistics.hessian.diagonal(), SearchOptions())
    assert weighted.scale is not None
    assert torch.equal(weighted.scale, scale)


def test_what_is_gathered_follows_from_the_options() -> None:
    assert resolve("int4").needs is Needs.NONE
    assert resolve("int4-gptq", {"correction": "0"}).needs == Needs.INPUTS
    assert resolve("int4-gptq", {"correction": "1"}).needs == Needs.INPUTS | Needs.UPSTREAM
    assert resolve("int4-gptq", {"correction": "0", "metric": "fisher"}).needs == Needs.INPUTS | Needs.FISHER


@pytest.mark.parametrize(
    "option",
    [{"sweeps": 0}, {"refit": False}, {"search": "range"}, {"correction": 0.5}, {"metric": "outputs"}, {"act_order": False}],
)
def test_each_step_is_an_option_that_changes_the_result(option: dict[str, object]) -> None:
    weight, statistics = inputs()
    statistics = Statistics(statistics.hessian, statistics.upstream, statistics.input_factor, inputs(16)[1].hessian)
    default, _ = resolve("int4-gptq").quantize_weight(weight, statistics, "x")
    other, report = resolve("int4-gptq", option).quantize_weight(weight, statistics, "x")
    assert not torch.equal(default.dequantize(), other.dequantize())
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss < report.rtn_loss


@pytest.mark.parametrize(("scheme", "corrects"), [("int4-gptq", False), ("int4-yaqa", True), ("int4-best", True)])
def test_who_walks_beside_the_original(scheme: str, corrects: bool) -> None:
    """The correction of upstream error costs a pass of the original: the fast scheme goes without, unless it is asked."""
    assert (Needs.UPSTREAM in resolve(scheme).needs) is corrects
    assert Needs.UPSTREAM in resolve(scheme, {"correction": 0.5}).needs
