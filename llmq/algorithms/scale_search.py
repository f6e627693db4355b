"""Scales and zero points that lose less than those of a group's range: a search over candidates, each refined in closed form.

With `c` the codes of a group as the grid counts them, `w` its weights and `h` how much each input matters, what is made small
is

    sum over the group of  h |w - w_hat|^p,      w_hat = c s + z  (floating zero),  (c - z) s  (integer zero),  c s  (symmetric)

where p is 2 unless asked otherwise, and h is 1, or the second moment of each input (the diagonal of the Hessian). Candidates
are the range of the group, shrunk (and a little widened) by a ladder of factors. Each is improved by alternating least
squares: codes for the scales, then the best scales for the codes, which is a system of one or two unknowns. That ends in the
nearest of many minima, so the best one is moved a little in every direction and improved again. Other norms than
p = 2 are reached by reweighting (h |w - w_hat|^(p - 2) for the next system); p < 1 is the norm of HQQ (Badri and Shaji,
2023), whose half-quadratic splitting solves the same problem for the zero point alone.

Symmetric grids are used in full, as llama.cpp's Q4_0: the scale's sign puts the longer side of a group on code -2^(bits - 1).

All scales are rounded to the dtype in which they are stored before an error is computed, and a candidate replaces another
only where its error is smaller. The first candidate is the one of `algorithms.rtn`, so the result never loses to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.algorithms.rtn import choose_scales, work_dtype
from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import torch_dtype

NUDGES = ((0.98, -0.25), (0.98, 0.25), (1.02, -0.25), (1.02, 0.25), (0.96, 0.0), (1.04, 0.0), (1.0, 0.5), (1.0, -0.5))
"""What the best candidate is moved by: a factor of its scale, and a shift of its floating zero point in steps of the grid."""
CHUNK_ELEMENTS = 1 << 18
"""Weights that are searched at a time: few enough for what is computed of them to stay in cache."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How scales are searched.

    Attributes:
        candidates: how many ranges are tried besides the group's own.
        shrink: the narrowest range, as a fraction of the group's.
        widen: the widest one.
        rounds: of alternating least squares, for each candidate.
        norm: the exponent p of the error.
        nudge: move the best candidate a little in every direction, and improve what that gives in the same way.
        mapping: how a symmetric range is laid over codes where the first candidate is chosen; see `algorithms.rtn`.
    """

    candidates: int = 16
    shrink: float = 0.65
    widen: float = 1.05
    rounds: int = 2
    norm: float = 2.0
    nudge: bool = True
    mapping: MappingType | None = None

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.rounds < 0:
            raise UsageError(f"a search needs a candidate and no fewer than 0 rounds, got {self.candidates} and {self.rounds}.")
        if not 0 < self.shrink <= self.widen:
            raise UsageError(f"ranges go from shrink > 0 to widen >= shrink, got {self.shrink} and {self.widen}.")
        if not 0 < self.norm <= 4:
            raise UsageError(f"norm must be above 0 and at most 4, got {self.norm}.")


def search_scales(
    weight: Tensor, grid: IntGrid, importance: Tensor | None = None, options: SearchOptions | None = None
) -> tuple[Tensor, Tensor | None]:
    """Search scale and zero point of every group.

    Args:
        weight: [N, K], floating point.
        grid: the integer grid.
        importance: [K], not negative: how much each input matters; None: all the same.
        options: see `SearchOptions`.

    Returns:
        Scale and zero point [N, groups] as they are stored; see `algorithms.rtn.choose_scales`. In every group the weighted
        error of rounding to nearest is at most that of the scales of `choose_scales`.

    Raises:
        ShapeError: when the weight does not fit the grid, or the importance not the weight.
        UsageError: when an importance is negative or not finite.
    """
    options = options or SearchOptions()
    n, k = weight.shape
    scale, zero_point = choose_scales(weight, grid, mapping=options.mapping)
    dtype = work_dtype(weight)
    groups = grid.groups(k)
    if importance is None:
        h = torch.ones(groups, k // groups, dtype=dtype, device=weight.device)
    else:
        if tuple(importance.shape) != (k,):
            raise ShapeError(f"a weight of {k} inputs needs an importance [{k}], got {list(importance.shape)}.")
        if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
            raise UsageError("importances must be finite and not negative; take the diagonal of a Hessian.")
        h = _scaled(importance.to(dtype).reshape(groups, k // groups))
    step = max(1, CHUNK_ELEMENTS // k)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        part = _Groups(weight[rows].to(dtype).reshape(-1, groups, k // groups), h, grid, options.norm)
        best = _Best(part, scale[rows], None if zero_point is None else zero_point[rows])
        for s, z in part.starts(options):
            best.offer(s, z, options.rounds)
        if options.nudge:
            for factor, shift in NUDGES:
                best.offer(*best.nudged(factor, shift), options.rounds)
        scale[rows] = best.scale.to(scale.dtype)
        if zero_point is not None and best.zero is not None:
            zero_point[rows] = best.zero.to(zero_point.dtype)
    return scale, zero_point


def _scaled(h: Tensor) -> Tensor:
    """Scale each group of importances [groups, G] to a mean of 1; a group of zeros gets ones."""
    mean = h.mean(1, keepdim=True)
    return torch.where(mean > 0, h / mean.clamp_min(torch.finfo(h.dtype).tiny), torch.ones_like(h))


class _Groups:
    """Some rows of a weight, by group: w [n, groups, G]; and what scales [n, groups] make of them."""

    def __init__(self, w: Tensor, h: Tensor, grid: IntGrid, norm: float) -> None:
        self.w, self.h, self.grid, self.norm = w, h, grid, norm
        self.h_sum = h.sum(-1)  # [groups]
        self.scale_dtype = torch_dtype(grid.scale_dtype)

    def starts(self, options: SearchOptions) -> list[tuple[Tensor, Tensor | None]]:
        """Return the candidates: (scale, zero point) of ranges between `shrink` and `widen` times the group's."""
        grid = self.grid
        factors = torch.linspace(options.widen, options.shrink, options.candidates).tolist()
        lowest, highest = self.w.amin(-1), self.w.amax(-1)
        if grid.symmetric:
            signed = torch.where(highest > -lowest, highest, lowest)  # of the largest magnitude
            return [(signed * (sign * factor / grid.qmin), None) for factor in factors for sign in (1, -1)]
        if grid.zero_point == "float":
            middle, width = (lowest + highest) / 2, (highest - lowest) / grid.qmax
            # codes 0 ... qmax lie around qmax / 2, which is half a step below the code that means the zero point
            return [(width * factor, middle + width * (factor / 2)) for factor in factors]
        lowest, highest = lowest.clamp_max(0), highest.clamp_min(0)
        found: list[tuple[Tensor, Tensor | None]] = []
        for factor in factors:
            s = (highest - lowest) * (factor / grid.qmax)
            middle = grid.qmax / 2 - (lowest + highest) / 2 / s
            found += [(s, torch.floor(middle).clamp(0, grid.qmax)), (s, torch.ceil(middle).clamp(0, grid.qmax))]
        return found

    def stored(self, s: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point as the grid's dtype holds them, in the dtype to compute in."""
        s = s.to(self.scale_dtype).to(s.dtype)
        if z is not None and self.grid.zero_point == "float":
            z = z.to(self.scale_dtype).to(z.dtype)
        return s, z

    def centred(self, s: Tensor, z: Tensor | None) -> Tensor:
        """Return, as floats, the nearest codes less the code that means 0 (or, of a floating zero point, that means it)."""
        grid = self.grid
        inverse = (1 / s)[..., None]
        if z is None:
            return (self.w * inverse).round_().clamp_(grid.qmin, grid.qmax)
        if grid.zero_point == "float":
            return ((self.w - z[..., None]) * inverse).round_().clamp_(-grid.mid, grid.qmax - grid.mid)
        low = -z[..., None]
        return torch.maximum((self.w * inverse).round_(), low).minimum(low + grid.qmax)

    def numbers(self, c: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return what centred codes mean."""
        numbers = c * s[..., None]
        return numbers + z[..., None] if z is not None and self.grid.zero_point == "float" else numbers

    def error(self, c: Tensor, s: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the error of each group [n, groups], and the weights of the next least squares (h, where the norm is 2)."""
        distance = self.w - self.numbers(c, s, z)
        if self.norm == 2:
            return (distance.square_() * self.h).sum(-1), self.h
        distance.abs_()
        floor = s.abs()[..., None] * 1e-3  # an exact hit would get an infinite weight
        return (distance.pow(self.norm) * self.h).sum(-1), torch.maximum(distance, floor).pow_(self.norm - 2) * self.h

    def solve(self, c: Tensor, weights: Tensor, s: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the best scale (and zero point) for centred codes; where codes leave it open, what it was."""
        cw = c * weights
        cc, cx = (cw * c).sum(-1), (cw * self.w).sum(-1)
        if z is None or self.grid.zero_point == "int":
            new = torch.where(cc > 0, cx / cc, s)
            if z is None:
                return new, None
            code = c + z[..., None]
            total = weights.sum(-1)
            middle = ((code - self.w / new[..., None]) * weights).sum(-1) / total
            moved = middle.round().clamp_(0, self.grid.qmax)
            return new, torch.where(torch.isfinite(moved), moved, z)
        one, c1, x1 = weights.sum(-1), cw.sum(-1), (weights * self.w).sum(-1)
        determinant = cc * one - c1 * c1
        open_ = determinant <= 1e-6 * cc * one  # all codes are the same
        new = torch.where(open_, s, (cx * one - c1 * x1) / determinant)
        return new, (x1 - new * c1) / one


class _Best:
    """The scales with the smallest error so far."""

    def __init__(self, groups: _Groups, scale: Tensor, zero_point: Tensor | None) -> None:
        self.groups = groups
        self.scale = scale.to(groups.w.dtype)
        self.zero = None if zero_point is None else zero_point.to(groups.w.dtype)
        self.error = groups.error(groups.centred(self.scale, self.zero), self.scale, self.zero)[0]

    def nudged(self, factor: float, shift: float) -> tuple[Tensor, Tensor | None]:
        """Return the best scales times `factor`; floating zero points move by `shift` steps of the grid, integer ones by one."""
        if self.zero is None:
            return self.scale * factor, None
        if self.groups.grid.zero_point == "float":
            return self.scale * factor, self.zero + shift * self.scale
        step = 0 if shift == 0 else 1 if shift > 0 else -1
        return self.scale * factor, (self.zero + step).clamp(0, self.groups.grid.qmax)

    def offer(self, s: Tensor, z: Tensor | None, rounds: int) -> None:
        """Take a candidate, or what some rounds of alternating least squares make of it, where that is better."""
        groups = self.groups
        for remaining in range(rounds, -1, -1):
            s, z = groups.stored(s, z)
            usable = torch.isfinite(s) & (s.abs() >= torch.finfo(groups.scale_dtype).smallest_normal)
            s = torch.where(usable, s, self.scale)
            z = None if z is None or self.zero is None else torch.where(usable & torch.isfinite(z), z, self.zero)
            c = groups.centred(s, z)
            error, weights = groups.error(c, s, z)
            better = error < self.error
            self.error = torch.where(better, error, self.error)
            self.scale = torch.where(better, s, self.scale)
            if z is not None and self.zero is not None:
                self.zero = torch.where(better, z, self.zero)
            if remaining:
                s, z = groups.solve(c, weights, s, z)
