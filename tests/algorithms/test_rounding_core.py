"""Search, correction, re-fit and coordinate descent, each against a slow exact computation in fp64; then their composition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.algorithms.coordinate import sweep
from llmq.algorithms.correction import corrected_target
from llmq.algorithms.feedback import two_sided
from llmq.algorithms.gptq import GptqOptions, factorise, gptq
from llmq.algorithms.metric import Metric, damped
from llmq.algorithms.refit import RIDGE, refit
from llmq.algorithms.rounding import Polishing, RoundingOptions, polish, round_linear
from llmq.algorithms.rtn import choose_scales, numbers_of, quantize_rtn, round_to_grid
from llmq.algorithms.scale_search import SearchOptions, search_scales
from llmq.algorithms.statistics import Statistics
from llmq.errors import SchemeError, ShapeError, UsageError
from llmq.numerics.grid import IntGrid

F64 = torch.float64
GRIDS = {
    "float zero": IntGrid(4, 16, symmetric=False, zero_point="float", scale_dtype="bfloat16"),
    "int zero": IntGrid(3, 16, symmetric=False, zero_point="int", scale_dtype="bfloat16"),
    "symmetric": IntGrid(4, 16, symmetric=True, zero_point="none", scale_dtype="bfloat16"),
    "per channel": IntGrid(2, None, symmetric=False, zero_point="float", scale_dtype="float32"),
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
each_coupling = pytest.mark.parametrize("coupled", [False, True], ids=["rows alone", "rows coupled"])


def second_moment(size: int, seed: int, rows: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator, dtype=F64) @ torch.randn(size, size, generator=generator, dtype=F64)
    x *= torch.linspace(0.2, 2, size, dtype=F64)
    return 2 / rows * x.T @ x


def problem(n: int, k: int, seed: int = 0, *, coupled: bool = False) -> tuple[Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=F64) * 0.05 + 0.01
    outputs = damped(second_moment(n, seed + 1), 0.01) if coupled else None
    return weight, Metric(damped(second_moment(k, seed + 2), 0.01), outputs)


def naive_loss(error: Tensor, metric: Metric) -> float:
    """The loss by the Kronecker product itself."""
    outputs = torch.eye(error.shape[0], dtype=F64) if metric.outputs is None else metric.outputs
    vector = error.double().reshape(-1)
    return (vector @ torch.kron(outputs.contiguous(), metric.inputs.contiguous()) @ vector).item()


def start(weight: Tensor, grid: IntGrid) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    scales = choose_scales(weight, grid)
    return round_to_grid(weight, grid, *scales), scales


def loss_of(weight: Tensor, codes: Tensor, scales: tuple[Tensor, Tensor | None], grid: IntGrid, metric: Metric) -> float:
    return naive_loss(weight - numbers_of(codes, grid, *scales, F64), metric)


@each_coupling
def test_metric_is_the_kronecker_form(coupled: bool) -> None:
    weight, metric = problem(5, 7, coupled=coupled)
    assert metric.loss(weight) == pytest.approx(naive_loss(weight, metric), rel=1e-12)
    outputs = torch.eye(5, dtype=F64) if metric.outputs is None else metric.outputs
    assert torch.allclose(metric.gradient(weight), outputs @ weight @ metric.inputs, rtol=1e-12)
    with pytest.raises(ShapeError, match="Hessian"):
        metric.check(5, 8)


def test_damping_holds_dead_columns_by_the_mean_of_the_others() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.0, 3.0]))
    assert torch.allclose(damped(matrix, 0.1).diagonal(), torch.tensor([1.2, 2.0, 3.2]))
    assert torch.equal(damped(torch.zeros(2, 2), 0.1), torch.eye(2))


@each_grid
@pytest.mark.parametrize("norm", [0.7, 2.0, 3.0])
def test_search_never_loses_to_the_range_in_any_group(grid: IntGrid, norm: float) -> None:
    weight = problem(9, 48)[0]
    weight[3, :16] = 0
    importance = torch.linspace(0, 3, 48, dtype=F64)

    def errors(scales: tuple[Tensor, Tensor | None]) -> Tensor:
        numbers = numbers_of(round_to_grid(weight, grid, *scales), grid, *scales, F64)
        distance = (weight - numbers).abs().pow(norm) * importance
        return distance.view(9, grid.groups(48), -1).sum(-1)

    scales = search_scales(weight, grid, importance, SearchOptions(norm=norm))
    found, before = errors(scales), errors(choose_scales(weight, grid))
    assert (found <= before * (1 + 1e-9) + 1e-12).all()
    assert found.sum() < 0.98 * before.sum()
    assert scales[0].dtype == choose_scales(weight, grid)[0].dtype


def test_search_finds_most_grids_that_the_weight_lies_on() -> None:
    codes = torch.randint(1, 16, (50, 32), generator=torch.Generator().manual_seed(0))
    codes[:, ::16], codes[:, 1::16] = 1, 15  # one code less than the grid has: the range gives another step
    weight = (codes - 8) * 0.25 + 0.5
    grid = GRIDS["float zero"]
    assert not torch.isclose(quantize_rtn(weight, grid).dequantize(), weight).view(50, 2, 16).all(-1).any()
    scale, zero_point = search_scales(weight, grid, None, SearchOptions(candidates=32, rounds=4, widen=1.1))
    numbers = numbers_of(round_to_grid(weight, grid, scale, zero_point), grid, scale, zero_point, torch.float32)
    assert (numbers == weight).view(50, 2, 16).all(-1).double().mean() > 0.4


def test_symmetric_search_uses_negative_scales() -> None:
    weight = torch.linspace(-0.7, 0.8, 16, dtype=F64)[None].clone()  # positive side longer: only a negative scale reaches it
    grid = GRIDS["symmetric"]
    scale, _ = search_scales(weight, grid)
    assert scale.item() < 0
    assert (weight - numbers_of(round_to_grid(weight, grid, scale, None), grid, scale, None, F64)).abs().max() < 0.051


def test_search_is_close_to_exhaustive() -> None:
    weight = problem(12, 16)[0]
    grid = IntGrid(3, 16, symmetric=True, zero_point="none", scale_dtype="float32")
    importance = torch.linspace(0.1, 2, 16, dtype=F64)
    best = torch.full((12,), torch.inf, dtype=F64)
    for step in torch.linspace(0.05, 1.5, 3000, dtype=F64) / 4:
        for sign in (1, -1):
            scale = weight.abs().amax(1, keepdim=True) * step * sign
            numbers = (weight / scale).round().clamp(-4, 3) * scale
            best = torch.minimum(best, ((weight - numbers).square() * importance).sum(1))
    scales = search_scales(weight, grid, importance, SearchOptions(candidates=32, shrink=0.4))
    numbers = numbers_of(round_to_grid(weight, grid, *scales), grid, *scales, F64)
    assert ((weight - numbers).square() * importance).sum() <= 1.03 * best.sum()


def test_search_refuses() -> None:
    with pytest.raises(ShapeError, match="importance"):
        search_scales(torch.ones(2, 16), GRIDS["symmetric"], torch.ones(8))
    with pytest.raises(UsageError, match="not negative"):
        search_scales(torch.ones(2, 16), GRIDS["symmetric"], -torch.ones(16))
    with pytest.raises(UsageError, match="norm"):
        SearchOptions(norm=5)


def test_correction_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(300, 12, generator=generator, dtype=F64) * torch.linspace(0.5, 2, 12, dtype=F64)
    quantized = original + 0.2 * torch.randn(300, 12, generator=generator, dtype=F64) @ torch.randn(
        12, 12, generator=generator, dtype=F64
    )
    weight = torch.randn(5, 12, generator=generator, dtype=F64)
    hessian = 2 / 300 * quantized.T @ quantized
    upstream = 2 / 300 * (original - quantized).T @ quantized
    wanted = torch.linalg.lstsq(quantized, original @ weight.T).solution.T
    factor, _ = factorise(hessian, GptqOptions(damping=0))
    assert factor is not None
    target = corrected_target(weight, factor, upstream, 1.0)
    assert torch.allclose(target, wanted, rtol=1e-9, atol=1e-9)
    assert torch.allclose(
        corrected_target(weight, factor, upstream, 0.25), weight + 0.25 * (wanted - weight), rtol=1e-9, atol=1e-9
    )
    # and any other weight loses its distance from the target under H on top of the minimum
    other = weight + 0.1

    def outputs_differ(w: Tensor) -> float:
        return (2 / 300 * (original @ weight.T - quantized @ w.T).square().sum()).item()

    assert outputs_differ(other) - outputs_differ(target) == pytest.approx(Metric(hessian).loss(target - other), rel=1e-9)


@each_grid
def test_refit_is_least_squares_of_every_row(grid: IntGrid) -> None:
    """Under fp32 scales, where rounding is small, against lstsq of the design matrix whitened by the root of H."""
    grid = IntGrid(grid.bits, grid.group_size, symmetric=grid.symmetric, zero_point=grid.zero_point, scale_dtype="float32")
    weight, metric = problem(7, 48)
    codes, scales = start(weight, grid)
    new = refit(weight, codes, scales, grid, metric)
    groups = grid.groups(48)
    root = torch.linalg.cholesky(metric.inputs).T
    for row in range(7):
        offset = 0.0 if scales[1] is None else float(grid.mid)
        columns, fixed = [], torch.zeros(48, dtype=F64)
        for group in range(groups):
            inside = torch.zeros(48, dtype=F64)
            inside[group * 48 // groups : (group + 1) * 48 // groups] = 1
            if grid.zero_point == "int":
                assert scales[1] is not None
                offset = float(scales[1][row, group])
            columns.append((codes[row].double() - offset) * inside)
            if grid.zero_point == "float":
                columns.append(inside)
        design = torch.stack(columns, 1)
        best = torch.linalg.lstsq(root @ design, root @ (weight[row] - fixed)).solution
        least = (root @ (design @ best - weight[row])).square().sum()
        got = (root @ (numbers_of(codes, grid, *new, F64)[row] - weight[row])).square().sum()
        before = (root @ (numbers_of(codes, grid, *scales, F64)[row] - weight[row])).square().sum()
        # the ridge leaves at most its own fraction of the way
        assert least <= got * (1 + 1e-9)
        assert got - least <= (1e-2 if RIDGE < 1e-3 else 1) * (before - least) + 1e-9


@each_grid
@pytest.mark.parametrize("coupled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["rows alone", "rows coupled"])
def test_every_step_lowers_the_exact_loss(grid: IntGrid, coupled: bool) -> None:
    for seed in range(3):
        weight, metric = problem(70 if coupled else 9, 48, seed, coupled=coupled)
        codes, scales = start(weight, grid)
        loss = naive_loss(weight - numbers_of(codes, grid, *scales, F64), metric)
        for _ in range(2):
            swept, changed = sweep(weight, codes, scales, grid, metric)
            after = loss_of(weight, swept, scales, grid, metric)
            assert int((swept != codes).sum()) <= changed
            assert after < loss if changed else after == loss
            codes, loss = swept, after
            scales = refit(weight, codes, scales, grid, metric)
            after = loss_of(weight, codes, scales, grid, metric)
            assert after <= loss * (1 + 1e-12)
            loss = after


@each_grid
@pytest.mark.parametrize(("n", "k"), [(5, 32), pytest.param(70, 144, marks=pytest.mark.slow)])
def test_two_sided_feedback_is_one_entry_after_another(grid: IntGrid, n: int, k: int) -> None:
    weight, metric = problem(n, k, coupled=True)
    assert metric.outputs is not None
    inputs, outputs = (factorise(part, GptqOptions())[0] for part in (metric.inputs, metric.outputs))
    assert inputs is not None
    assert outputs is not None
    scales = choose_scales(weight, grid)
    ordered = weight[outputs.order][:, inputs.order]
    group = inputs.order // (k // grid.groups(k))
    scale, zero = scales[0][outputs.order], None if scales[1] is None else scales[1][outputs.order]
    left, upper = outputs.unit_upper.T, inputs.unit_upper
    error, codes = torch.zeros(n, k, dtype=F64), torch.zeros(n, k, dtype=F64)
    residual = torch.zeros(n, k, dtype=F64)
    for row, column in itertools.product(range(n), range(k)):
        feedback = left[row, : row + 1] @ error[: row + 1, : column + 1] @ upper[: column + 1, column]
        here = group[column]
        cell = scale[row, here].view(1, 1), None if zero is None else zero[row, here].view(1, 1)
        wanted = (ordered[row, column] + feedback).view(1, 1)
        code = round_to_grid(wanted, grid, *cell)
        codes[row, column] = code.item()
        number = numbers_of(code, grid, *cell, F64).item()
        error[row, column] = ordered[row, column] - number
        residual[row, column] = wanted.item() - number
    found = two_sided(weight, scales, grid, inputs, outputs)
    assert torch.equal(found[outputs.order][:, inputs.order].double(), codes)
    # what was rounded away is the loss: the factors diagonalise the damped form
    inputs_damped, outputs_damped = metric.inputs.clone(), metric.outputs.clone()
    inputs_damped[inputs.order, inputs.order] += inputs.added
    outputs_damped[outputs.order, outputs.order] += outputs.added
    back = torch.empty_like(error)
    back[outputs.order[:, None], inputs.order] = error
    by_parts = (outputs.pivots[:, None] * inputs.pivots * residual.square()).sum().item()
    assert Metric(inputs_damped, outputs_damped).loss(back) == pytest.approx(by_parts, rel=1e-9)


def test_two_sided_feedback_without_coupling_is_gptq() -> None:
    weight, metric = problem(8, 48)
    grid = GRIDS["float zero"]
    inputs, _ = factorise(metric.inputs, GptqOptions())
    outputs, _ = factorise(torch.eye(8, dtype=F64), GptqOptions())
    assert inputs is not None
    assert outputs is not None
    one_sided, report = gptq(weight, metric.inputs, grid, GptqOptions())
    assert report.rtn_rows == 0
    assert torch.equal(two_sided(weight, choose_scales(weight, grid), grid, inputs, outputs), one_sided.codes())


def test_sweep_equals_one_entry_after_another() -> None:
    weight, metric = problem(4, 32)
    grid = GRIDS["float zero"]
    codes, scales = start(weight, grid)
    order = torch.argsort(metric.inputs.diagonal(), descending=True, stable=True)
    slow = codes.clone()
    for column, row in itertools.product(order.tolist(), range(4)):
        losses = []
        for code in range(16):
            slow[row, column] = code
            losses.append(loss_of(weight, slow, scales, grid, metric))
        slow[row, column] = min(range(16), key=losses.__getitem__)
    swept, _ = sweep(weight, codes, scales, grid, metric)
    assert torch.equal(swept, slow)


@each_coupling
def test_after_enough_sweeps_no_single_code_could_be_better(coupled: bool) -> None:
    weight, metric = problem(6, 32, coupled=coupled)
    grid = GRIDS["symmetric"]
    codes, scales = start(weight, grid)
    for _ in range(60):
        codes, changed = sweep(weight, codes, scales, grid, metric)
        if not changed:
            break
    assert changed == 0
    loss = loss_of(weight, codes, scales, grid, metric)
    for row, column, step in itertools.product(range(6), range(32), (-1, 1)):
        other = codes.clone()
        other[row, column] = (int(codes[row, column]) + step) if -8 <= int(codes[row, column]) + step <= 7 else codes[row, column]
        assert loss_of(weight, other, scales, grid, metric) >= loss * (1 - 1e-12)


@pytest.mark.parametrize("metric", ["inputs", "outputs", "fisher"])
@each_grid
def test_round_linear_reports_what_it_did(grid: IntGrid, metric: str) -> None:
    weight, _ = problem(24, 64)
    statistics = Statistics(second_moment(64, 1), 0.05 * second_moment(64, 2), second_moment(64, 3), second_moment(24, 4))
    options = RoundingOptions(metric=metric, correction=0.0, trace=True)  # type: ignore[arg-type]
    quantized, report = round_linear(weight, statistics, grid, options)
    inputs = statistics.input_factor if metric == "fisher" else statistics.hessian
    assert inputs is not None
    plain = Metric(inputs, None if metric == "inputs" else statistics.output_factor)
    assert report.loss == pytest.approx(naive_loss(weight - quantized.dequantize(F64), plain), rel=1e-9)
    assert report.rtn_loss == pytest.approx(naive_loss(weight - quantize_rtn(weight, grid).dequantize(F64), plain), rel=1e-9)
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss < 0.8 * report.rtn_loss
    values = [value for name, value in report.steps if name in ("gptq", "sweep", "refit")]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(values))
    again, _ = round_linear(weight, statistics, grid, options, factorised=factorise(inputs, options.gptq_options()))
    assert all(torch.equal(a, b) for a, b in zip(quantized.tensors, again.tensors, strict=True))


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(sorted(GRIDS)), st.sampled_from(["range", "error", "weighted"]), st.booleans())
def test_never_above_round_to_nearest(seed: int, name: str, search: str, use_gptq: bool) -> None:
    grid = GRIDS[name]
    weight, _ = problem(8, 48, seed)
    hessian = second_moment(48, seed, rows=20)  # of low rank
    statistics = Statistics(hessian.float(), 0.1 * hessian.float())
    options = RoundingOptions(search=search, gptq=use_gptq, correction=0.5, sweeps=1)  # type: ignore[arg-type]
    quantized, report = round_linear(weight.float(), statistics, grid, options)
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss <= report.rtn_loss
    assert torch.isfinite(quantized.dequantize()).all()


def test_polish_can_start_anywhere() -> None:
    weight, metric = problem(8, 48)
    grid = GRIDS["float zero"]
    codes, scales = start(weight, grid)
    worse = (codes + torch.randint(0, 2, codes.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 15).to(codes.dtype)
    new, new_scales, steps = polish(weight, worse, scales, grid, metric, Polishing(3, trace=True))
    assert loss_of(weight, new, new_scales, grid, metric) < loss_of(weight, codes, scales, grid, metric)
    assert steps[-1][1] == pytest.approx(loss_of(weight, new, new_scales, grid, metric), rel=1e-9)


def test_fallbacks_and_refusals() -> None:
    weight, _ = problem(4, 32)
    grid = GRIDS["symmetric"]
    hessian = second_moment(32, 0)
    broken = hessian.clone()
    broken[0, 1] = torch.nan
    quantized, report = round_linear(weight, Statistics(broken), grid, RoundingOptions())
    assert torch.equal(quantized.qdata, quantize_rtn(weight, grid).qdata)
    assert (report.loss, report.fallback) == (None, "the Hessian is not finite")
    indefinite = hessian - 100 * hessian.diagonal().mean() * torch.eye(32, dtype=F64)
    quantized, report = round_linear(weight, Statistics(indefinite), grid, RoundingOptions())
    assert report.fallback is not None
    assert "positive definite" in report.fallback
    assert torch.equal(quantized.qdata, quantize_rtn(weight, grid).qdata)
    with pytest.raises(SchemeError, match="Fisher"):
        round_linear(weight, Statistics(hessian), grid, RoundingOptions(metric="fisher"))
    with pytest.raises(SchemeError, match="upstream"):
        round_linear(weight, Statistics(hessian), grid, RoundingOptions(correction=0.5))
    with pytest.raises(UsageError, match="sweeps"):
        RoundingOptions(sweeps=-1)
    with pytest.raises(UsageError, match="correction"):
        RoundingOptions(correction=2)
