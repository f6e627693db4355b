"""GPTQ (Frantar et al., arXiv:2210.17323): round the columns of a weight one after another, each making up for the errors so far.

For one linear with weight W [N, K] and inputs x, the codes minimise tr(E H E^T), E = W - W_hat, H = 2/n sum x^T x [K, K].
The paper walks through the columns and, after rounding column k, changes every later column by a row of the Cholesky factor
of H^-1. The same numbers come out without an inverse (LDLQ: Chee et al., arXiv:2307.13304, theorem 6): with

    H + damping = U D U^T,  U unit upper triangular,  D diagonal,

column k is rounded at  W[:, k] + sum over j < k of E[:, j] U[j, k].  What is rounded away there, r[:, k], gives the loss for
free, since E U = r and tr(E H E^T) = sum over k of D[k] |r[:, k]|^2. So one factorisation (K^3 / 3, in fp64) and one
triangular product (N K^2, matrix multiplications but for blocks on the diagonal) are all there is to pay. Round to nearest
goes through the same product beside it, so that every row's two losses are known and the better row is kept.

Group scales are given, or come from the original weight (static groups), so the order of the columns is free: with `act_order`
they are taken by falling diagonal of H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.algorithms.columns import ColumnGrid
from llmq.algorithms.products import narrowed, product
from llmq.algorithms.rtn import choose_scales, numbers_of, round_to_grid, work_dtype
from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight

DAMPING_STEPS = 4
"""How often damping is tried, ten times more each time, before round to nearest is taken."""

PANEL_ROWS = 512
"""Rows of a matrix [K, K] that are copied or factorised at a time."""

PANEL = 16
"""Columns that are updated by matrix-vector products before a matrix product brings the block up to date."""


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ runs.

    Attributes:
        damping: added to the diagonal of H, as a fraction of its mean over live columns; not negative.
        act_order: take the columns by falling diagonal of H instead of from left to right.
        block_size: columns between two large matrix products. It changes the speed, not the codes.
        mapping: how a group's range is laid over the codes; None: as `algorithms.rtn`.
    """

    damping: float = 0.01
    act_order: bool = True
    block_size: int = 128
    mapping: MappingType | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise UsageError(f"damping must be a fraction of the mean diagonal, 0 or more, got {self.damping}.")
        if self.block_size < 1:
            raise UsageError(f"block_size must be at least 1 column, got {self.block_size}.")


@dataclass(frozen=True, slots=True)
class GptqReport:
    """What one run did.

    Attributes:
        loss: tr(E H E^T) of the codes that were kept, H without damping; None when H is not finite.
        rtn_loss: the same for round to nearest on the same grid; never below `loss`.
        damping: the fraction that was used at last; None when H is not finite.
        tried: every fraction that was tried, in order.
        dead_columns: columns whose input was always zero. Their weights are rounded to nearest.
        rtn_rows: rows for which round to nearest lost less, and was kept.
        fallback: why the whole weight was rounded to nearest; None where it was not.
    """

    loss: float | None
    rtn_loss: float | None
    damping: float | None
    tried: tuple[float, ...]
    dead_columns: int
    rtn_rows: int
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class Factor:
    """H + damping = U D U^T, columns in the order in which they are rounded.

    order: [K] indices into the original columns. unit_upper: U [K, K]. pivots: D [K]. added: [K], what was added to the
    diagonal of H (for dead columns all of it), so that it can be taken out of the losses again. damping: the fraction that
    was enough.
    """

    order: Tensor
    unit_upper: Tensor
    pivots: Tensor
    added: Tensor
    damping: float


Factorised = tuple[Factor | None, tuple[float, ...]]
"""A factor, and the fractions of damping that were tried for it."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: IntGrid,
    options: GptqOptions,
    *,
    scales: tuple[Tensor, Tensor | None] | None = None,
    factorised: Factorised | None = None,
) -> tuple[QuantizedWeight, GptqReport]:
    """Quantize one weight with GPTQ. Neither argument is changed.

    Args:
        weight: [N, K], floating point.
        hessian: [K, K] fp32 or fp64, symmetric, 2/n sum x^T x of the layer's inputs; fp64 runs everything in fp64.
        grid: the integer grid.
        options: see `GptqOptions`.
        scales: scale and zero point [N, groups] of the grid, as they are stored; None: those of `algorithms.rtn`.
        factorised: what `factorise` returned for this Hessian, damping and order; None: it is called here.

    Returns:
        The quantized weight, and what was done. In every row the Hessian-weighted loss is at most that of round to nearest.

    Raises:
        ShapeError: when the weight does not fit the grid, or the Hessian not the weight.
        UsageError: when the Hessian is of a narrower dtype than fp32.
    """
    n, k = weight.shape
    if tuple(hessian.shape) != (k, k):
        raise ShapeError(f"a weight of {k} inputs needs a Hessian [{k}, {k}], got {list(hessian.shape)}.")
    if hessian.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"a Hessian must be accumulated in float32 or float64, got {hessian.dtype}.")
    scale, zero_point = choose_scales(weight, grid, mapping=options.mapping) if scales is None else scales
    original = weight.to(torch.promote_types(work_dtype(weight), hessian.dtype))
    rtn_codes = round_to_grid(original, grid, scale, zero_point)

    diagonal = torch.diagonal(hessian)
    if not (torch.isfinite(diagonal).all() and torch.isfinite(hessian.sum())):
        report = GptqReport(None, None, None, (), 0, n, "the Hessian is not finite")
        return QuantizedWeight.from_codes(grid, rtn_codes, scale, zero_point), report

    dead = int((diagonal == 0).sum())
    factor, tried = factorise(hessian, options) if factorised is None else factorised
    if factor is None:
        error = original - numbers_of(rtn_codes, grid, scale, zero_point, original.dtype)
        loss = ((error @ hessian.to(error.dtype)) * error).sum(dtype=torch.float64).item()
        fallback = f"the Hessian is not positive definite, even with {tried[-1]:g} of its mean diagonal added"
        report = GptqReport(loss, loss, tried[-1], tried, dead, n, fallback)
        return QuantizedWeight.from_codes(grid, rtn_codes, scale, zero_point), report

    columns = _Columns(original, grid, (scale, zero_point), factor.order, rtn_codes)
    losses, rtn_losses = _sweep(columns, factor, options.block_size)
    codes = columns.codes_in_place()
    keep_rtn = losses > rtn_losses
    codes[keep_rtn] = rtn_codes[keep_rtn]
    report = GptqReport(
        loss=torch.minimum(losses, rtn_losses).sum().item(),
        rtn_loss=rtn_losses.sum().item(),
        damping=tried[-1],
        tried=tried,
        dead_columns=dead,
        rtn_rows=int(keep_rtn.sum()),
    )
    return QuantizedWeight.from_codes(grid, codes, scale, zero_point), report


def factorise(hessian: Tensor, options: GptqOptions) -> Factorised:
    """Factorise H in fp64, with more and more damping until it succeeds; U is returned in the dtype of H.

    Linears that read the same input share it.

    Returns:
        The factor (None when no damping on the ladder was enough), and the fractions that were tried.
    """
    diagonal = torch.diagonal(hessian).double()
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else torch.arange(len(diagonal))
    order = order.to(hessian.device)
    live_mean = diagonal[~dead].mean().item() if not bool(dead.all()) else 1.0
    # H = U D U^T with U upper is the usual L L^T of the matrix with rows and columns reversed
    backwards = order.flip(0)
    tried: list[float] = []
    for step in range(DAMPING_STEPS):
        # damping 0 climbs too: to the ladder's usual first step
        tried.append(options.damping * 10**step if options.damping > 0 else 0.0 if step == 0 else 0.001 * 10**step)
        added = torch.full_like(diagonal, tried[-1] * live_mean)
        added[dead] = live_mean  # a dead row and column are zero: any pivot leaves the column to itself
        # with 11,008 inputs this matrix takes 1 GB: it is there once, and the rest goes by panels
        matrix = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
        for rows, panel in zip(torch.split(backwards, PANEL_ROWS), torch.split(matrix, PANEL_ROWS), strict=True):
            panel.copy_(hessian.index_select(0, rows).index_select(1, backwards))
        matrix.diagonal().add_(added[backwards])
        if _cholesky_(matrix):
            pivots = torch.diagonal(matrix).clone()
            unit = torch.empty(hessian.shape, dtype=hessian.dtype, device=hessian.device)
            start = 0
            for panel, out in zip(torch.split(matrix, PANEL_ROWS), _from_below(unit), strict=True):
                out.copy_(panel.tril(start).div_(pivots).flip(0, 1))
                start += len(panel)
            return Factor(order, unit, pivots.square().flip(0), added[order], tried[-1]), tuple(tried)
    return None, tuple(tried)


def _cholesky_(matrix: Tensor) -> bool:
    """Replace the lower triangle of a symmetric matrix [K, K] by its Cholesky factor, in place; what is above it is left.

    torch's own keeps the matrix beside its factor. Returns False when the matrix is not positive definite.
    """
    for start in range(0, len(matrix), PANEL_ROWS):
        own = slice(start, min(start + PANEL_ROWS, len(matrix)))
        # a column of panels at a time: what the columns before it make of it, its block on the diagonal, the rows below that
        matrix[start:, own].addmm_(matrix[start:, :start], matrix[own, :start].t(), alpha=-1)
        lower, info = torch.linalg.cholesky_ex(matrix[own, own])
        pivots = lower.diagonal()
        if int(info) != 0 or not bool((torch.isfinite(pivots) & (pivots > 0)).all()):
            return False
        matrix[own, own] = lower
        below = matrix[own.stop :, own]
        below.copy_(torch.linalg.solve_triangular(lower.t(), below, upper=True, left=False))
    return True


def _from_below(matrix: Tensor) -> list[Tensor]:
    """Cut a matrix [K, K] into panels of `PANEL_ROWS` rows, counted from its last row upwards."""
    ends = range(matrix.shape[0], 0, -PANEL_ROWS)
    return [matrix[max(0, end - PANEL_ROWS) : end] for end in ends]


def feed_back(target: Tensor, scales: tuple[Tensor, Tensor | None], grid: IntGrid, factor: Factor, block_size: int) -> Tensor:
    """Return GPTQ's codes [N, K] for a weight [N, K] fp32 or fp64, whether or not they are better than the nearest ones.

    Args:
        target: what is rounded; everything is computed in its dtype.
        scales: scale and zero point [N, groups], as they are stored.
        grid: the integer grid.
        factor: of H [K, K]; see `factorise`.
        block_size: see `GptqOptions`.
    """
    columns = _Columns(target, grid, scales, factor.order)
    for _ in _blocks(columns, factor, block_size):
        pass
    return columns.codes_in_place()


class _Columns:
    """A weight and its grid, transposed and ordered: row k is the k-th column to be rounded.

    `error` is that of the codes so far, and beside it that of other codes where there are some: [K, N] or [K, 2 N].
    """

    def __init__(
        self,
        weight: Tensor,
        grid: IntGrid,
        scales: tuple[Tensor, Tensor | None],
        order: Tensor,
        others: Tensor | None = None,
    ) -> None:
        self.order = order
        dtype, device = weight.dtype, weight.device
        n, k = weight.shape
        self.weight = weight.index_select(1, order).t().contiguous()  # [K, N]
        self.error = torch.empty(k, n if others is None else 2 * n, dtype=dtype, device=device)
        if others is not None:
            torch.sub(self.weight, numbers_of(others, grid, *scales, dtype).index_select(1, order).t(), out=self.error[:, n:])
        self.group = (order // (k // scales[0].shape[1])).tolist()
        self.grids = ColumnGrid(grid, *scales, dtype)
        self.codes = torch.empty(self.weight.shape, dtype=torch.int8 if grid.symmetric else torch.uint8, device=device)

    def round(self, k: int, target: Tensor) -> Tensor:
        """Round the k-th column at `target` [N], keep its codes, and return the numbers they mean [N]."""
        codes, numbers = self.grids.nearest(self.group[k], target)
        self.codes[k] = codes
        return numbers

    def codes_in_place(self) -> Tensor:
        """Return the codes [N, K] with every column back where it came from."""
        codes = torch.empty(self.codes.shape[1], self.codes.shape[0], dtype=self.codes.dtype, device=self.codes.device)
        codes[:, self.order] = self.codes.t()
        return codes


def _sweep(columns: _Columns, factor: Factor, block_size: int) -> tuple[Tensor, Tensor]:
    """Round all columns.

    Returns:
        Per row, in fp64, the loss of these codes and of the other ones [N], both without damping.
    """
    n, error = columns.weight.shape[1], columns.error
    losses = torch.zeros(error.shape[1], dtype=torch.float64, device=error.device)
    for start, stop, residual in _blocks(columns, factor, block_size):
        pivots, added = factor.pivots[start:stop], factor.added[start:stop]
        losses += pivots @ residual.double().square() - added @ error[start:stop].double().square()
    losses.clamp_(min=0)  # the difference of two sums: a loss of nothing can come out a rounding error below it
    return losses[:n], losses[n:]


def _blocks(columns: _Columns, factor: Factor, block_size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Round block by block; yields where each starts and stops, and what was rounded away there, [block, N or 2 N]."""
    k, n = columns.weight.shape
    upper = factor.unit_upper.to(columns.weight.dtype)
    error = columns.error
    beside = error.shape[1] > n
    narrow = narrowed(torch.empty_like(error), k)  # of the blocks that are done; `error` itself where products are not narrow
    narrow = error if narrow.dtype == error.dtype else narrow
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        # the feedback of everything before this block, for both; then inside the block, for the other codes
        residual = product(narrowed(upper[:start, start:stop].t(), k), narrow[:start])  # [block, N or 2 N]
        if beside:
            residual[:, n:] += upper[start:stop, start:stop].t() @ error[start:stop, n:]
        for low in range(start, stop, PANEL):
            high = min(low + PANEL, stop)
            residual[low - start : high - start, :n].addmm_(upper[start:low, low:high].t(), error[start:low, :n])
            for column in range(low, high):
                r = residual[column - start, :n]
                r.addmv_(error[low:column, :n].t(), upper[low:column, column])
                r += columns.weight[column]
                numbers = columns.round(column, r)
                torch.sub(columns.weight[column], numbers, out=error[column, :n])
                r -= numbers
        if narrow is not error:
            narrow[start:stop] = error[start:stop]
        yield start, stop, residual
