"""SmoothQuant: the expected error is the measured one, the descent finds its least, and blocks keep their function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms.folding import FoldPair, column_amax, fold_pairs
from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.smoothquant import SmoothOptions, learned_scale, noise, paper_scale, simulated_linear, smooth_, static_scale
from llmq.errors import SchemeError, UsageError
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.ops.reference import Reference
from llmq.ops.schema import Case

WEIGHT = IntGrid(8, None, symmetric=True, zero_point="none", scale_dtype="float32")
FORM = LinearFormat(WEIGHT, ActivationGrid(symmetric=True))
STATIC = LinearFormat(WEIGHT, ActivationGrid(symmetric=True, static=True))
PLAIN, PLAIN_128 = (FoldPair("norm", ("linear",), width) for width in (32, 128))


def heavy_tailed(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose channels differ by orders of magnitude, and in how often they are far out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    return x * torch.exp(torch.randn(rows, width, generator=generator)) * torch.logspace(-1, 1, width)


@pytest.mark.parametrize("bias", [True, False])
def test_simulated_linear_is_the_reference_kernel(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x, scale = nn.Linear(33, 7, bias=bias), heavy_tailed(12, 33).reshape(3, 4, 33), torch.logspace(-1, 1, 33)
    simulate = simulated_linear(FORM, None)
    for factor in (None, scale):
        columns = torch.ones(33) if factor is None else factor
        weight = quantize_rtn(linear.weight.detach() * columns, WEIGHT)
        case = Case(FORM, 7, 33, torch.float32, "cpu")
        kernel = Reference()
        expected = kernel.linear((x / columns).reshape(12, 33), kernel.prepack(weight), linear.bias, case)
        got = simulate(linear, factor, None)(x)
        assert got.shape == (3, 4, 7)
        torch.testing.assert_close(got.reshape(12, 7), expected, rtol=1e-5, atol=1e-5)


def test_noise_is_what_rounding_does() -> None:
    """Against the error of real rounding, which is uniform where steps are small beside the inputs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 128, generator=generator) * torch.exp(0.3 * torch.randn(4000, 128, generator=generator))
    linear = nn.Linear(128, 64, bias=False)
    linear.weight = nn.Parameter(torch.randn(64, 128, generator=generator) * torch.logspace(-0.3, 0.3, 128))
    pair = FoldPair("norm", ("linear",), 128)
    for scale in (torch.ones(128), torch.logspace(-0.5, 0.5, 128), torch.logspace(0.5, -0.5, 128)):
        with torch.no_grad():
            measured = (simulated_linear(FORM, None)(linear, scale, None)(x) - linear(x)).square().sum(1).mean()
        # a token's largest input has no error, which is 1 of 128; 64 rows with one largest weight each, likewise
        assert 0.95 < measured / noise(scale, x, [linear.weight.detach()], pair, torch.ones(4000)) < 1.05


@pytest.mark.parametrize("step", [0.02, 0.2], ids=["clips", "clips nothing"])
def test_noise_of_a_static_step_is_what_rounding_and_clipping_do(step: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 128, generator=generator)
    linear = nn.Linear(128, 64, bias=False)
    linear.weight = nn.Parameter(torch.randn(64, 128, generator=generator) * torch.logspace(-0.3, 0.3, 128))
    weights, scale, steps = [linear.weight.detach()], torch.logspace(-0.2, 0.2, 128), torch.tensor([step])
    with torch.no_grad():
        simulated = simulated_linear(STATIC, None)(linear, scale, steps)
        measured = (simulated(x) - linear(x)).square().sum(1).mean()
    # what is clipped in one channel and in another are independent here, so that their products cancel
    assert 0.93 < measured / noise(scale, x, weights, PLAIN_128, torch.ones(4000), steps) < 1.07
    assert noise(scale, x, weights, PLAIN_128, torch.ones(4000), steps / 4) > noise(
        scale, x, weights, PLAIN_128, torch.ones(4000), static_scale(x / scale, [weights[0] * scale], torch.ones(4000))
    )


def test_descent_for_a_static_step_lowers_the_static_error() -> None:
    """A channel that is large always and one that is large rarely: with a token's own step the second may stay, here not."""
    x, weight, one = heavy_tailed(600, 32), torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), torch.ones(600)

    def least(scale: Tensor) -> Tensor:
        return noise(scale, x, [weight], PLAIN, one, static_scale(x / scale, [weight * scale], one))

    start = torch.ones(32)
    dynamic = learned_scale(x, [weight], PLAIN, start, SmoothOptions(), one)
    static = learned_scale(x, [weight], PLAIN, start, SmoothOptions(), one, static_scale(x, [weight], one))
    assert least(static) < 0.95 * least(dynamic)
    assert least(static) < 0.5 * least(start)


def test_noise_of_two_consumers_is_the_sum() -> None:
    x, first, second = heavy_tailed(50, 32), torch.randn(5, 32), torch.randn(9, 32)
    scale, one = torch.rand(32) + 0.5, torch.ones(50)
    total = noise(scale, x, [first], PLAIN, one) + noise(scale, x, [second], PLAIN, one)
    both = noise(scale, x, [first, second], PLAIN, one)
    torch.testing.assert_close(both, total)
    twice = noise(scale, torch.cat([x, x[:10]]), [first], PLAIN, torch.ones(60))
    weighted = torch.cat([torch.full((10,), 2.0), torch.ones(40)])
    torch.testing.assert_close(noise(scale, x, [first], PLAIN, weighted), twice)


def test_descent_finds_the_least_noise() -> None:
    """Against scales that are known to be best: one token, one output, where noise(s) = |a|^2 |W s|^2 has its minimum s = |x|.

    With the weights' own part left out of the comparison, which a second large row makes negligible.
    """
    x = torch.logspace(-0.5, 0.5, 16).repeat(4, 1)
    weight = torch.ones(1, 16)
    pair = FoldPair("norm", ("linear",), 16)
    found = learned_scale(x, [weight], pair, torch.ones(16), SmoothOptions(iterations=150), torch.ones(4))
    grid = [
        noise(torch.logspace(-0.5, 0.5, 16) ** power, x, [weight], pair, torch.ones(4)) for power in torch.linspace(-1, 1.5, 26)
    ]
    assert noise(found, x, [weight], pair, torch.ones(4)) <= min(grid) * 1.01
    again = learned_scale(x, [weight], pair, torch.ones(16), SmoothOptions(iterations=150), torch.ones(4))
    assert torch.equal(found, again)


def test_paper_scale_is_equation_4() -> None:
    amax, columns = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([0.1, 0.4, 0.2])
    for alpha in (0.0, 0.3, 1.0):
        got = paper_scale(amax, columns, alpha)
        expected = amax**alpha / columns ** (1 - alpha)
        torch.testing.assert_close(got / got[0], expected / expected[0])
        assert abs(float(got.log().mean())) < 1e-6
    silent = paper_scale(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert torch.isfinite(silent).all()
    assert (silent > 0).all()


@pytest.mark.parametrize("form", [FORM, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("smoothing", ["alpha", "learned"])
def test_block_keeps_its_function_and_loses_less(
    tiny_llama: Callable[..., Any], block_work: Callable[..., Any], smoothing: Any, form: LinearFormat
) -> None:
    work = block_work(tiny_llama(torch.float32))
    reports = smooth_(work, form, None, SmoothOptions(smoothing, step=0.25, iterations=60))
    assert [report.producer for report in reports] == [pair.producer for pair in fold_pairs(work.module)]
    assert all(report.error <= report.plain_error for report in reports)
    assert reports[0].kept != "none"  # the norm has a channel 16 times larger than the others
    assert reports[0].error < 0.5 * reports[0].plain_error
    for h, y in zip(work.inputs, work.targets, strict=True):
        torch.testing.assert_close(work.run(h), y, rtol=1e-4, atol=1e-4)


def test_nothing_is_changed_where_nothing_is_gained(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    work = block_work(tiny_llama(torch.float32))
    before = {name: parameter.clone() for name, parameter in work.module.named_parameters()}
    assert smooth_(work, FORM, None, SmoothOptions("none")) == []
    work.linears = {name: linear for name, linear in work.linears.items() if name == "self_attn.q_proj"}
    assert smooth_(work, FORM, None, SmoothOptions()) == []
    assert all(torch.equal(before[name], parameter) for name, parameter in work.module.named_parameters())


def test_static_scale_is_the_best_of_all() -> None:
    x, weight = heavy_tailed(200, 32), torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    energy = weight.square().sum(0)

    def loss(scale: float) -> float:
        codes = (x / scale).round().clamp(-127, 127)
        return float(((codes * scale - x).square() * energy).sum())

    found = static_scale(x, [weight], torch.ones(200))
    assert found.shape == (1,)
    assert found.dtype == torch.float32
    full = float(x.abs().max()) / 127
    assert loss(float(found)) <= min(loss(full * 2 ** (-step / 4)) for step in range(40)) * 1.02
    assert loss(float(found)) <= loss(full)
    assert static_scale(torch.zeros(3, 32), [weight], torch.ones(3)) > 0


def test_refusals(tiny_llama: Callable[..., Any], block_work: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="integer weights and activations"):
        simulated_linear(LinearFormat(WEIGHT), None)
    with pytest.raises(UsageError, match="step between alphas"):
        SmoothOptions(step=0.0)
    with pytest.raises(UsageError, match="at least 1"):
        SmoothOptions(iterations=0)
    work = block_work(tiny_llama(torch.float32))
    work.inputs[0][0, 0] = float("nan")
    with pytest.raises(SchemeError, match="not finite during calibration"):
        smooth_(work, FORM, None, SmoothOptions())
    work.inputs = []
    with pytest.raises(SchemeError, match="without inputs"):
        smooth_(work, FORM, None, SmoothOptions())
    assert column_amax(work.module, fold_pairs(work.module)[0]).shape == (48,)
