"""AutoRound (Cheng et al., arXiv:2309.05516): learn which way to round, and how far the grid reaches, from the block's output.

Of one weight w with scale s and zero point z (here of a grid that has one), the code is

    q = clamp(round(w / s + z + d + v)),   v in [-0.5, 0.5],   s = s_0 (1 + a),   z = z_0 + b

v, a and b are learned together for all linears of a block, so that the block's output comes near its target: the straight-through
estimator passes gradients through rounding, and their signs alone move the parameters (SignSGD), by steps that fall to zero.
The paper learns a and b as factors on the range's two ends, which is the same plane seen from other axes. d is 0 for codes that
are nearest to their weights, so learning starts at round to nearest; where another algorithm (GPTQ) chose a code that is not the
nearest, d puts the start on that code.

What is optimised is what is stored: scales and zero points are rounded to their dtype in every forward pass. Of all states that
were measured on the same held-out windows, the starting one included, the best is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.algorithms.simulate import Forward, Work, importance_of, replaced
from llmq.errors import SchemeError, UsageError
from llmq.numerics.grid import ActivationGrid, IntGrid
from llmq.numerics.weight import QuantizedWeight, torch_dtype
from llmq.ops.reference import quantize_activation

REACH = 0.5
"""Largest change of a scale, as a fraction of it, and of a zero point, in steps of the grid."""


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How learning runs.

    Attributes:
        steps: updates.
        batch: windows an update looks at.
        rounding_rate: first step of v; None: 1 / steps, with which v can cross all of its range.
        range_rate: first step of a and b; None: as `rounding_rate`.
        optimizer: 'sign' (SignSGD) or 'adam'.
        check_every: updates between two measurements.
        check_windows: most windows that states are measured on; an eighth of all is held out for that, where there are eight.
        seed: of the order of windows.
        relative: weigh a token's error by 1 / mean square of its target, as the norm that comes next will; else alike.
    """

    steps: int = 200
    batch: int = 8
    rounding_rate: float | None = None
    range_rate: float | None = None
    optimizer: Literal["sign", "adam"] = "sign"
    check_every: int = 20
    check_windows: int = 32
    seed: int = 0
    relative: bool = True

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.check_every, self.check_windows) < 1:
            raise UsageError("steps, batch, check_every and check_windows must be at least 1.")
        if any(rate is not None and rate < 0 for rate in (self.rounding_rate, self.range_rate)):
            raise UsageError(f"learning rates must not be negative, got {self.rounding_rate} and {self.range_rate}.")


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What learning did to a block.

    Attributes:
        first_loss: (weighted) mean squared error of the block's output before learning, on windows chosen for that.
        loss: of the state that was kept; never above `first_loss`.
        step: after how many updates it was reached; 0: nothing was better than the start.
        changed: share of codes that are not what they were.
    """

    first_loss: float
    loss: float
    step: int
    changed: float


class TunedWeight:
    """One linear's weight with its learned parameters.

    Attributes:
        start: the quantized weight that learning starts from.
        rounding: v [N, K], fp32.
        scale_change: a [N, groups, 1], fp32.
        zero_change: b [N, groups, 1] in steps of the grid; None for a grid without zero points.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        if not isinstance(start.grid, IntGrid) or start.scale is None:
            raise UsageError("rounding can be learned on an integer grid only; this weight is floating.")
        self.start, self.grid = start, start.grid
        self.shape = (start.shape[0], start.scale.shape[1], start.shape[1] // start.scale.shape[1])
        self.weight = weight.detach().float().reshape(self.shape)
        self.scale = start.scale.float().unsqueeze(2)
        self.zero = None if start.zero_point is None else start.zero_point.float().unsqueeze(2)
        self.rounding = torch.zeros_like(self.weight)
        self.scale_change = torch.zeros_like(self.scale)
        self.zero_change = None if self.zero is None else torch.zeros_like(self.zero)
        codes = start.codes().float().reshape(self.shape)
        place = self._place(*self.ranges())
        nearest = place.round().clamp(self.grid.qmin, self.grid.qmax)
        self.offset = torch.where(nearest == codes, 0.0, codes - place)

    def parameters(self) -> list[Tensor]:
        """Return a (and b), whose range is `REACH`; `rounding` is apart, since its step differs."""
        return [change for change in (self.scale_change, self.zero_change) if change is not None]

    def ranges(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point [N, groups, 1] as they would be stored, in fp32; gradients pass."""
        dtype = torch_dtype(self.grid.scale_dtype)
        wanted = self.scale * (1 + self.scale_change)
        scale = wanted + (wanted.detach().to(dtype).float() - wanted.detach())
        if self.zero is None or self.zero_change is None:
            return scale, None
        if self.grid.zero_point == "int":
            wanted = (self.zero + self.zero_change).clamp(self.grid.qmin, self.grid.qmax)
            return scale, wanted + (wanted.detach().round() - wanted.detach())
        wanted = self.zero + self.zero_change * self.scale
        return scale, wanted + (wanted.detach().to(dtype).float() - wanted.detach())

    def codes(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the codes, fp32 [N, groups, G]; gradients pass where no end of the grid is reached."""
        place = self._place(scale, zero) + self.offset + self.rounding
        return (place + (place.detach().round() - place.detach())).clamp(self.grid.qmin, self.grid.qmax)

    def numbers(self) -> Tensor:
        """Return the weight [N, K] that the parameters mean, fp32; gradients pass."""
        scale, zero = self.ranges()
        codes = self.codes(scale, zero)
        if zero is None:
            numbers = codes * scale
        elif self.grid.zero_point == "int":
            numbers = (codes - zero) * scale
        else:
            numbers = (codes - self.grid.mid) * scale + zero
        return numbers.reshape(self.start.shape)

    def quantized(self) -> QuantizedWeight:
        """Return what the parameters mean, as it is stored."""
        with torch.no_grad():
            scale, zero = self.ranges()
            codes = self.codes(scale, zero).reshape(self.start.shape)
        stored_zero = None
        if zero is not None:
            assert self.start.zero_point is not None
            stored_zero = zero.squeeze(2).to(self.start.zero_point.dtype)
        assert self.start.scale is not None
        dtype = torch.int8 if self.grid.symmetric else torch.uint8
        stored_scale = scale.squeeze(2).to(self.start.scale.dtype)
        packed = QuantizedWeight.from_codes(self.grid, codes.to(dtype), stored_scale, stored_zero)
        return replace(packed, input_scale=self.start.input_scale)

    def _place(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return where the weights lie among the codes."""
        if zero is None:
            return self.weight / scale
        if self.grid.zero_point == "int":
            return self.weight / scale + zero
        return (self.weight - zero) / scale + self.grid.mid


@dataclass(frozen=True)
class Tuning:
    """What is learned, and towards what.

    Attributes:
        work: the block; its linears have their float weights.
        weights: quantized weights to start from, by the names of `work.linears`.
        targets: batches of outputs [B, T, hidden] of the same windows as `work.inputs`.
        activations: how inputs are quantized, by the same names; linears that are not named compute in floating point.
        metric: M [hidden, hidden], symmetric and positive semidefinite: an output's error D counts as D M D^T. The Fisher
            information of the block's output is such a matrix. None: the identity.
    """

    work: Work
    weights: Mapping[str, QuantizedWeight]
    targets: Sequence[Tensor]
    activations: Mapping[str, ActivationGrid] | None = None
    metric: Tensor | None = None


def tune(tuning: Tuning, options: TuneOptions) -> tuple[dict[str, QuantizedWeight], TuneReport]:
    """Learn the rounding of a block's weights; nothing of the block is changed.

    Args:
        tuning: see `Tuning`.
        options: see `TuneOptions`.

    Returns:
        The weights, on the grids that they came on, and what was done. The same seed gives the same weights.

    Raises:
        SchemeError: there is nothing to learn from, or the loss is not finite.
        UsageError: a weight is on a floating grid.
    """
    work = tuning.work
    tuned = {name: TunedWeight(work.linears[name].weight, weight) for name, weight in tuning.weights.items()}
    windows = _Windows(work.inputs, tuning.targets, next(work.module.parameters()).device)
    keep = _Keeper(tuned)
    if not tuned:
        return {}, TuneReport(0.0, 0.0, 0, 0.0)
    updater = _Updater(list(tuned.values()), options)
    checked = windows.held_out(options.check_windows)
    first = keep.offer(_measure(tuning, tuned, windows, checked, options), 0)
    order = windows.order(options.batch, options.seed, checked)
    for step in range(1, options.steps + 1):
        with torch.enable_grad():
            for parameter in updater.parameters:
                parameter.requires_grad_()
            loss = _loss(tuning, tuned, *windows.take(next(order), relative=options.relative))
            gradients = torch.autograd.grad(loss, updater.parameters)
        updater.update(gradients, 1 - (step - 1) / options.steps)
        if step % options.check_every == 0 or step == options.steps:
            keep.offer(_measure(tuning, tuned, windows, checked, options), step)
    keep.restore()
    result = {name: weight.quantized() for name, weight in tuned.items()} if keep.step else dict(tuning.weights)
    total = sum(weight.shape[0] * weight.shape[1] for weight in result.values())
    changed = sum(int((weight.codes() != tuning.weights[name].codes()).sum()) for name, weight in result.items())
    return result, TuneReport(first, keep.loss, keep.step, changed / total)


def _loss(tuning: Tuning, tuned: Mapping[str, TunedWeight], h: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    grids = tuning.activations or {}
    forwards = {name: _forward(tuning, name, weight.numbers(), grids.get(name)) for name, weight in tuned.items()}
    with replaced(tuning.work.module, forwards):
        difference = tuning.work.run(h) - target
    seen = difference if tuning.metric is None else difference @ tuning.metric.to(difference.dtype)
    return ((seen * difference).mean(-1) * weight).mean()


def _forward(tuning: Tuning, name: str, numbers: Tensor, grid: ActivationGrid | None) -> Forward:
    bias = tuning.work.linears[name].bias
    scale = tuning.weights[name].input_scale

    def forward(x: Tensor) -> Tensor:
        if grid is not None:
            rows = x.detach().reshape(-1, x.shape[-1])
            codes, row_scale = quantize_activation(rows, grid, scale)
            x = x + (codes * row_scale - rows).reshape(x.shape)
        return F.linear(x, numbers, bias)

    return forward


def _measure(
    tuning: Tuning, tuned: Mapping[str, TunedWeight], windows: _Windows, chosen: Sequence[int], options: TuneOptions
) -> float:
    """Return the mean loss over the windows that are `chosen`."""
    sums = []
    with torch.no_grad():
        for start in range(0, len(chosen), options.batch):
            part = chosen[start : start + options.batch]
            sums.append(_loss(tuning, tuned, *windows.take(part, relative=options.relative)).double() * len(part))
    told: list[float] = torch.stack(sums).tolist()  # read once: a GPU is not waited for in between
    loss = sum(told) / len(chosen)
    if not loss < float("inf"):
        raise SchemeError("the loss of block-wise learning is not finite; the model is broken before it is quantized.")
    return loss


class _Windows:
    """Single windows out of batches of them, which may be elsewhere than the block."""

    def __init__(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], device: torch.device) -> None:
        if len(inputs) != len(targets) or any(h.shape != y.shape for h, y in zip(inputs, targets, strict=True)):
            raise SchemeError("block-wise learning needs a target for every input; record the original block's outputs.")
        self.inputs, self.targets, self._device = inputs, targets, device
        self._mean = float(torch.cat([importance_of(y.to(device)).reshape(-1) for y in targets]).mean()) if targets else 1.0
        self.places = [(batch, row) for batch, h in enumerate(inputs) for row in range(h.shape[0])]
        if not self.places:
            raise SchemeError("block-wise learning needs at least one window of calibration text.")

    def take(self, chosen: Sequence[int], *, relative: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs and targets [B, T, hidden], and the weights of tokens [B, T], 1 on average; fp32, where the block is."""
        places = [self.places[index] for index in chosen]
        h = torch.stack([self.inputs[batch][row] for batch, row in places]).to(self._device).float()
        target = torch.stack([self.targets[batch][row] for batch, row in places]).to(self._device).float()
        return h, target, importance_of(target) / self._mean if relative else target.new_ones(target.shape[:2])

    def held_out(self, count: int) -> list[int]:
        """Return every eighth window, at most `count`, evenly spread; all of them where there are fewer than eight."""
        if len(self.places) < 8:
            return list(range(len(self.places)))
        count = min(count, len(self.places) // 8)
        return [index * len(self.places) // count for index in range(count)]

    def order(self, batch: int, seed: int, held_out: Sequence[int]) -> Iterator[list[int]]:
        """Yield batches without end: every other window once before any comes twice, each time in a new order."""
        generator = torch.Generator().manual_seed(seed)
        apart = set(held_out)
        rest = [index for index in range(len(self.places)) if index not in apart] or list(held_out)
        queue: list[int] = []
        batch = min(batch, len(rest))
        while True:
            while len(queue) < batch:
                queue += [rest[index] for index in torch.randperm(len(rest), generator=generator).tolist()]
            yield queue[:batch]
            queue = queue[batch:]


class _Updater:
    """SignSGD, or Adam (arXiv:1412.6980), with steps that fall linearly and parameters that stay in their range."""

    def __init__(self, tuned: Sequence[TunedWeight], options: TuneOptions) -> None:
        rounding = 1 / options.steps if options.rounding_rate is None else options.rounding_rate
        ranges = rounding if options.range_rate is None else options.range_rate
        self.parameters: list[Tensor] = []
        self._rates: list[tuple[float, float]] = []
        for weight in tuned:
            for parameter, rate, reach in [(weight.rounding, rounding, 0.5), *((p, ranges, REACH) for p in weight.parameters())]:
                if rate > 0:
                    self.parameters.append(parameter)
                    self._rates.append((rate, reach))
        if not self.parameters:
            raise UsageError("block-wise learning with both learning rates 0 learns nothing; leave it out.")
        self._adam = options.optimizer == "adam"
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters] if self._adam else []
        self._updates = 0

    def update(self, gradients: Sequence[Tensor], decay: float) -> None:
        """Move every parameter against its gradient, by `decay` times its rate."""
        self._updates += 1
        with torch.no_grad():
            for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                rate, reach = self._rates[index]
                direction = self._direction(index, gradient) if self._adam else gradient.sign()
                parameter.sub_(direction, alpha=rate * decay).clamp_(-reach, reach)

    def _direction(self, index: int, gradient: Tensor) -> Tensor:
        first, second = self._moments[index]
        first.lerp_(gradient, 1 - 0.9)
        second.lerp_(gradient.square(), 1 - 0.95)
        root = (second / (1 - 0.95**self._updates)).sqrt().add_(torch.finfo(torch.float32).tiny)
        return first / (1 - 0.9**self._updates) / root


class _Keeper:
    """The best state so far."""

    def __init__(self, tuned: Mapping[str, TunedWeight]) -> None:
        self._tuned = tuned
        self._state: list[Tensor] = []
        self.loss, self.step = float("inf"), 0

    def offer(self, loss: float, step: int) -> float:
        """Keep the state of now if its loss is the least; return the loss."""
        if loss < self.loss:
            self._state = [parameter.detach().clone() for parameter in self._all()]
            self.loss, self.step = loss, step
        return loss

    def restore(self) -> None:
        """Go back to the best state."""
        with torch.no_grad():
            for parameter, kept in zip(self._all(), self._state, strict=True):
                parameter.copy_(kept)

    def _all(self) -> list[Tensor]:
        return [p for weight in self._tuned.values() for p in (weight.rounding, *weight.parameters())]
