"""SmoothQuant (Xiao et al., arXiv:2211.10438): scales that make inputs easier to quantize, and weights only a little harder.

Before the int8 product, inputs x [K] are divided by s [K] and the weight's columns multiplied by it, where that costs nothing
(`algorithms.folding`). A token's rounding errors are as large as its largest input allows, so a channel that is often the largest
costs all the others. The paper's scales are

    s_k = max|x_k|^alpha / max|W_:k|^(1 - alpha)                                                     (equation 4)

and alpha is searched here. They look at a channel's one largest value. The expected squared error itself is known: rounding
errors are all but uniform, so with a = max_k |x_k| / s_k of each token, E a mean over tokens, and b_n = max_k |W_nk| s_k,

    noise(s) = E[a^2] / (12 * 127^2) * sum_k |W_:k|^2 s_k^2  +  sum_n b_n^2 / (12 * 127.5^2) * sum_k E[x_k^2] / s_k^2

and `learned_scale` descends on it: each s_k becomes as large as pays for the channel's share of the tokens in which it is the
largest. As a function of log s it is convex, so that there is one least value, and no other to be caught in.

With static activations, one step d for all tokens, what is clipped adds to the error, and the first sum is another one:

    E[ sum_k |W_:k|^2 s_k^2 (d^2 / 12 + max(0, |x_k| / s_k - 127 d)^2) ]

Scales that are best for a step of each token's own are bad ones here: they leave every token its own outliers.

Of the scales found this way and by alpha, and of no scales, those stay whose simulated output is nearest to the float one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.algorithms.folding import FoldPair, column_amax, fold_, fold_pairs
from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.simulate import Forward, Work, part_of, record
from llmq.errors import UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.ops.reference import quantize_activation

FLOOR = 1e-5
"""Channels are taken to be at least this fraction of the largest: a channel that never fires must not get a scale of 0."""

LEARNING_RATE = 0.03
"""Of the descent on log(s): scales can change by a factor of 20 in 200 iterations, as the rate falls to 0."""

STEP_TOKENS = 1024
"""Tokens that a static step is found on for each scale that is tried."""

Smoothing = Literal["none", "alpha", "learned"]
Simulate = Callable[[nn.Linear, Tensor | None, Tensor | None], Forward]


@dataclass(frozen=True, slots=True)
class SmoothOptions:
    """How scales are found.

    Attributes:
        smoothing: 'alpha' tries the paper's scales, 'learned' also descends from the best of them; 'none' finds nothing.
        step: between the alphas that are tried, from 0 to 1.
        iterations: of the descent.
        rows: tokens that one iteration looks at.
        tokens: that the simulated errors are measured on.
        seed: of the draw of rows.
    """

    smoothing: Smoothing = "learned"
    step: float = 0.25
    iterations: int = 200
    rows: int = 2048
    tokens: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise UsageError(f"the step between alphas must be in (0, 1], got {self.step}.")
        if min(self.iterations, self.rows, self.tokens) < 1:
            raise UsageError("iterations, rows and tokens must be at least 1.")


@dataclass(frozen=True, slots=True)
class SmoothReport:
    """What was done at one place.

    Attributes:
        producer: where the scales were folded into.
        kept: 'none', 'alpha' or 'learned'.
        alpha: the best of those that were tried; None where none was.
        error: of the simulated output with the scales that were kept, see `Replay.error`.
        plain_error: the same without scales; never below `error`.
    """

    producer: str
    kept: Smoothing
    alpha: float | None
    error: float
    plain_error: float


def smooth_(work: Work, form: LinearFormat, mapping: MappingType | None, options: SmoothOptions) -> list[SmoothReport]:
    """Find scales at every place of a block and fold them, in place.

    Args:
        work: the block; linears that are not in `work.linears` are left alone.
        form: an integer grid for weights, and one for activations.
        mapping: of the weights' ranges, see `quantize_rtn`.
        options: see `SmoothOptions`.

    Returns:
        A report for every place.

    Raises:
        UsageError: the format does not quantize activations.
        SchemeError: the block has no places that scales can be folded into, or its inputs are not finite.
    """
    simulate = simulated_linear(form, mapping)
    if options.smoothing == "none":
        return []
    return [_smooth_pair(work, pair, form, simulate, options) for pair in fold_pairs(work.module, work.linears)]


def _smooth_pair(work: Work, pair: FoldPair, form: LinearFormat, simulate: Simulate, options: SmoothOptions) -> SmoothReport:
    part, static = part_of(pair.consumers[0]), form.activation is not None and form.activation.static
    seen = record(work, [part], inputs_of=pair.consumers[:1], tokens=options.tokens)
    replay, x = seen.replays[part], seen.inputs[pair.consumers[0]]
    linears = {name: work.linears[name] for name in pair.consumers}
    weights = [linear.weight for linear in linears.values()]
    few = slice(None, None, max(1, len(x) // STEP_TOKENS))

    def error(scale: Tensor | None) -> float:
        columns = None if scale is None else pair.expand(scale)
        step = _step(x[few], weights, columns, seen.importance[few]) if static else None
        return replay.error({name: simulate(linear, columns, step) for name, linear in linears.items()})

    plain = error(None)
    amax, columns = pair.gather(x.abs().amax(0)).amax(0), column_amax(work.module, pair)
    tried = [(error(paper_scale(amax, columns, alpha)), alpha) for alpha in _alphas(options.step)]
    best, alpha = min(tried)
    scale = paper_scale(amax, columns, alpha)
    kept: Smoothing = "alpha"
    if options.smoothing == "learned":
        start = scale if best < plain else torch.ones_like(scale)
        step = _step(x[few], weights, pair.expand(start), seen.importance[few]) if static else None
        learned = learned_scale(x, weights, pair, start, options, seen.importance, step)
        learned_error = error(learned)
        if learned_error < best:
            best, scale, kept = learned_error, learned, "learned"
    if best >= plain:
        return SmoothReport(pair.producer, "none", alpha, plain, plain)
    fold_(work.module, pair, scale)
    return SmoothReport(pair.producer, kept, alpha, best, plain)


def paper_scale(amax: Tensor, column_amax: Tensor, alpha: float) -> Tensor:
    """Return max|x|^alpha / max|W|^(1 - alpha) [C], with a geometric mean of 1; see the module for the equation.

    Args:
        amax: [C] largest |x| of each channel.
        column_amax: [C] largest |W| of each channel's columns.
        alpha: 0 (weights alone) to 1 (inputs alone).
    """
    log_scale = alpha * _log(amax) - (1 - alpha) * _log(column_amax)
    return torch.exp(log_scale - log_scale.mean())


def noise(
    scale: Tensor, x: Tensor, weights: list[Tensor], pair: FoldPair, importance: Tensor, step: Tensor | None = None
) -> Tensor:
    """Return the expected squared error of a token's outputs under int8 inputs and weights, summed over outputs; see the module.

    Args:
        scale: [C].
        x: [n, K] inputs.
        weights: [N, K] each: all that read them.
        pair: maps channels to inputs.
        importance: [n] weights of the tokens.
        step: [1], of the scaled inputs where activations are static; None: each token has its own.
    """
    columns = pair.expand(scale)
    energy = torch.stack([weight.float().square().sum(0) for weight in weights]).sum(0) * columns.square()
    sizes = (x / columns).abs()
    if step is None:
        inputs = sizes.amax(1).square() @ importance * energy.sum() / 127**2
    else:
        inputs = importance @ ((12 * (sizes - 127 * step).clamp_min(0).square() + step.square()) @ energy)
    rows = torch.stack([(weight.float() * columns).abs().amax(1).square().sum() for weight in weights]).sum()
    return (inputs + rows * (importance @ x.square() / columns.square()).sum() / 127.5**2) / (12 * importance.sum())


def learned_scale(
    x: Tensor,
    weights: list[Tensor],
    pair: FoldPair,
    start: Tensor,
    options: SmoothOptions,
    importance: Tensor,
    step: Tensor | None = None,
) -> Tensor:
    """Descend on log(noise) over log(s) with Adam (arXiv:1412.6980), and return the scales [C] with the least noise on all of x.

    Args:
        x: [n, K] inputs, fp32.
        weights: [N, K] each: all that read them.
        pair: maps channels to inputs.
        start: [C] the first scales.
        options: see `SmoothOptions`.
        importance: [n] weights of the tokens.
        step: [1], the first static step, which is learned too; None: each token has its own.
    """
    generator = torch.Generator().manual_seed(options.seed)
    weights = [weight.detach().float() for weight in weights]
    with torch.enable_grad():
        log_scale = start.float().log().detach().clone().requires_grad_()
        log_step = None if step is None else step.float().log().detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([log_scale] if log_step is None else [log_scale, log_step], lr=LEARNING_RATE)
        for iteration in range(options.iterations):
            chosen = torch.randint(len(x), (min(options.rows, len(x)),), generator=generator).to(x.device)
            now = None if log_step is None else log_step.exp()
            value = noise(log_scale.exp(), x[chosen], weights, pair, importance[chosen], now).log()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / options.iterations)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found = log_scale.detach()
    last = None if log_step is None else (log_step.detach() + found.mean()).exp()
    scale = torch.exp(found - found.mean())
    better = noise(scale, x, weights, pair, importance, last) <= noise(start.float(), x, weights, pair, importance, step)
    return scale if bool(better) else start


def simulated_linear(form: LinearFormat, mapping: MappingType | None) -> Simulate:
    """Return a function that makes a linear's quantized forward: what the format computes for a weight rounded to nearest.

    The function takes the linear; scales [K] of its inputs, or None, which divide the inputs and multiply the columns; and the
    step [1] of the scaled inputs where activations are static, else None.

    Raises:
        UsageError: the format is not of integer weights and activations.
    """
    grid, activation = form.weight, form.activation
    if not isinstance(grid, IntGrid) or activation is None:
        raise UsageError("smoothing is for integer weights and activations; this format has a floating weight or input.")

    def make(linear: nn.Linear, scale: Tensor | None, step: Tensor | None) -> Forward:
        weight = linear.weight.detach()
        numbers = quantize_rtn(weight if scale is None else weight * scale, grid, mapping=mapping).dequantize()

        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            codes, row_scale = quantize_activation(rows if scale is None else rows / scale, activation, step)
            return F.linear(codes * row_scale, numbers, linear.bias).reshape(*x.shape[:-1], -1)

        return forward

    return make


def _step(x: Tensor, weights: list[Tensor], columns: Tensor | None, importance: Tensor) -> Tensor:
    """Return the static step of inputs that are divided by `columns`."""
    if columns is None:
        return static_scale(x, weights, importance)
    return static_scale(x / columns, [weight.detach() * columns for weight in weights], importance)


def _alphas(step: float) -> list[float]:
    count = round(1 / step)
    return [index / count for index in range(count + 1)]


def _log(values: Tensor) -> Tensor:
    wide = values.float()
    return wide.clamp_min(max(float(wide.max()) * FLOOR, torch.finfo(torch.float32).smallest_normal)).log()


def static_scale(x: Tensor, weights: list[Tensor], importance: Tensor) -> Tensor:
    """Return one scale for all inputs of a linear, fp32 [1]: the one with the least error, clipping included.

    The error of an input counts as much as the weights that read it: sum over k of |W_:k|^2 (x_k - x_hat_k)^2. Scales from that
    of the largest input down to 2^-10 of it are tried, first in steps of 2^(1/4), then between the best one's neighbours.

    Args:
        x: [n, K] inputs.
        weights: [N, K] each: all that read them.
        importance: [n] weights of the tokens.
    """
    x = x.float()
    energy = torch.stack([weight.detach().float().square().sum(0) for weight in weights]).sum(0)
    largest = float(x.abs().max())
    if largest == 0:
        return x.new_full((1,), 1 / 127)

    def error(power: float) -> Tensor:
        scale = largest / 127 * 2**-power
        difference = torch.clamp((x / scale).round(), -127, 127).mul_(scale).sub_(x)
        return (difference.square_() @ energy * importance).sum(dtype=torch.float64)

    def best(powers: list[float]) -> float:
        errors: list[float] = torch.stack([error(power) for power in powers]).tolist()  # read once all are on their way
        return min(zip(errors, powers, strict=True))[1]

    coarse = best([step / 4 for step in range(41)])
    power = best([coarse + step / 32 for step in range(-8, 9) if coarse + step / 32 >= 0])
    return x.new_full((1,), largest / 127 * 2**-power)
