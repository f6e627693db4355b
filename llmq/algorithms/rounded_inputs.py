"""Codes for weights whose inputs are rounded too: each linear of a block makes up for what rounding does to what it reads.

A linear whose inputs x are rounded to x_hat should give W x, and multiplies W_hat by x_hat. The best weight before rounding is
therefore not W but W E[x x_hat^T] E[x_hat x_hat^T]^-1: it shrinks along directions in which rounding noise drowns the inputs.
That is the correction of upstream error (`algorithms.correction`) with rounding as that error, and GPTQ then minimises the error
for the inputs x_hat that will really come.

Rounding errors d = x_hat - x have nothing to do with x, nor those of two channels with each other. So what is estimated is
H = 2/n sum x^T x and the diagonal D = 2/n sum d^2, tokens weighted by their importance (`algorithms.simulate`), and the moments
above are taken to be H and H + D. Their estimates from x_hat itself would differ by chance alone, and with few tokens W would be
bent to that chance.

Even so the new weights fit the windows that they were computed from better than others. An eighth of the windows is therefore
held out, and a linear whose output is not nearer there keeps the codes that it had.

Groups of linears are done in the order of their calls, each for the outputs of those that are done already. With static
activations the scale of a group's inputs is found on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.algorithms.rounding import RoundingOptions, round_linear
from llmq.algorithms.simulate import Forward, Work, importance_of, record, replaced
from llmq.algorithms.smoothquant import static_scale
from llmq.algorithms.statistics import Statistics
from llmq.errors import UsageError
from llmq.numerics.grid import Activation, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.reference import quantize_activation

SAMPLE_TOKENS = 8192
"""Tokens that a static scale is searched on, and that codes are checked on."""


@dataclass(frozen=True, slots=True)
class InputOptions:
    """What is done.

    Attributes:
        rounding: how weights are rounded for their rounded inputs; None: they keep their codes.
    """

    rounding: RoundingOptions | None


def quantize_for_rounded_inputs(
    work: Work, groups: Sequence[Sequence[str]], weights: dict[str, QuantizedWeight], form: LinearFormat, options: InputOptions
) -> dict[str, QuantizedWeight]:
    """Quantize a block's linears for inputs that are quantized as the format says; nothing of the block is changed.

    Args:
        work: the block, with its float weights.
        groups: names of linears that read the same input, in the order of their calls.
        weights: what they would be otherwise, by name.
        form: an integer grid for weights, and one for activations.
        options: see `InputOptions`.

    Returns:
        The weights, with an input scale where the format has static activations.

    Raises:
        UsageError: the format does not quantize activations.
        SchemeError: a linear did not run, or its inputs are not finite.
    """
    grid, activation = form.weight, form.activation
    if not isinstance(grid, IntGrid) or activation is None:
        raise UsageError("inputs are rounded by formats of integer weights and activations only; this one has a floating part.")
    learn, check = _split(work.inputs)
    done: dict[str, QuantizedWeight] = {}
    forwards: dict[str, Forward] = {}
    for group in groups:
        scale, sample = None, None
        if activation.static:
            sample = _inputs(work, work.inputs, group[0], forwards)
            scale = static_scale(sample[0], [work.linears[name].weight for name in group], sample[1])
        statistics = None
        if options.rounding is not None:
            statistics = _statistics(work, learn, group[0], forwards, (activation, scale))
            sample = _inputs(work, check, group[0], forwards)
        for name in group:
            linear, weight = work.linears[name], replace(weights[name], input_scale=scale)
            if statistics is not None and options.rounding is not None and sample is not None:
                new, _ = round_linear(linear.weight.detach(), statistics, grid, options.rounding)
                weight = min(weight, replace(new, input_scale=scale), key=lambda one: _error(linear, one, activation, *sample))
            done[name] = weight
            forwards[name] = quantized_forward(linear, weight, activation)
    return done


def quantized_forward(linear: nn.Linear, weight: QuantizedWeight, activation: Activation) -> Forward:
    """Return what a linear computes once it is quantized: its inputs rounded, its bias kept; fp32."""
    numbers = weight.dequantize()

    def forward(x: Tensor) -> Tensor:
        return F.linear(rounded(x, activation, weight.input_scale), numbers, linear.bias)

    return forward


def rounded(x: Tensor, activation: Activation, scale: Tensor | None) -> Tensor:
    """Return the numbers that the codes of inputs [..., K] mean, fp32."""
    codes, row_scale = quantize_activation(x.reshape(-1, x.shape[-1]), activation, scale)
    return (codes * row_scale).reshape(x.shape)


def rounding_cost(
    weight: QuantizedWeight, activation: Activation, x: Tensor, inputs_factor: Tensor, outputs_factor: Tensor
) -> float:
    """Estimate what rounding a linear's inputs costs the model, in nats per token.

    To second order it is E[(g . W d)^2] / 2 with the gradients g of the linear's outputs and the rounding errors d = x_hat - x.
    Fisher factors (`algorithms.fisher`) know g only together with x: H_O is E[|x|^2 g^T g] up to its size, and tr(H_I) that of
    E[|x|^2 |g|^2]. Rounding errors grow with their token's inputs, so |x|^2 is a weight that they would have anyway:

        cost = tr(H_I) / E|x|^2  x  E[(W d)^T H_O (W d)] / 2

    Args:
        weight: [N, K].
        activation: how inputs are rounded.
        x: [R, K] inputs.
        inputs_factor: H_I [K, K].
        outputs_factor: H_O [N, N], with a mean diagonal of 1.
    """
    x = x.float()
    energy = x.square().sum(1).mean()
    if energy == 0:
        return 0.0
    errors = (rounded(x, activation, weight.input_scale) - x) @ weight.dequantize().t()
    moved = ((errors @ outputs_factor) * errors).sum(1).mean()
    return float(inputs_factor.trace() / energy * moved / 2)


def _split(inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the batches to compute weights from, and those to check them on: every eighth; the same where there is only one."""
    if len(inputs) == 1 and len(inputs[0]) > 1:
        inputs = [window[None] for window in inputs[0]]
    check = [batch for index, batch in enumerate(inputs) if index % 8 == 7 or index == len(inputs) - 1]
    learn = [batch for index, batch in enumerate(inputs) if index % 8 != 7 and index != len(inputs) - 1]
    return learn or check, check


def _inputs(work: Work, inputs: Sequence[Tensor], name: str, forwards: dict[str, Forward]) -> tuple[Tensor, Tensor]:
    """Return a sample of what a linear reads [n, K], with `forwards` in place, and the tokens' importance [n]."""
    with replaced(work.module, forwards):
        seen = record(work, [], inputs_of=[name], tokens=SAMPLE_TOKENS, inputs=inputs)
    return seen.inputs[name], seen.importance


def _error(linear: nn.Linear, weight: QuantizedWeight, activation: Activation, x: Tensor, importance: Tensor) -> float:
    with torch.no_grad():
        difference: Tensor = quantized_forward(linear, weight, activation)(x) - linear(x)
    return float((difference.square().sum(1) * importance).sum(dtype=torch.float64))


def _statistics(
    work: Work,
    inputs: Sequence[Tensor],
    name: str,
    forwards: dict[str, Forward],
    quantizer: tuple[Activation, Tensor | None],
) -> Statistics:
    """Return the second moments of a linear's rounded inputs, H + D, and with exact ones less these, -D; see the module."""
    width = work.linears[name].weight.shape[1]
    hessian = torch.zeros(width, width, device=work.linears[name].weight.device)
    noise = torch.zeros(width, dtype=torch.float64, device=hessian.device)
    total = torch.zeros((), dtype=torch.float64, device=hessian.device)
    seen: list[Tensor] = []
    handle = work.linears[name].register_forward_pre_hook(lambda _, args: seen.append(args[0].float().reshape(-1, width)))
    try:
        with torch.no_grad(), replaced(work.module, forwards):
            for batch in inputs:
                importance = importance_of(work.run(batch)).reshape(-1, 1)
                x = seen.pop()
                weighted = x * importance
                hessian.addmm_(weighted.t(), x)
                noise.add_(((rounded(x, *quantizer) - x).square() * importance).sum(0, dtype=torch.float64))
                total += importance.sum(dtype=torch.float64)
    finally:
        handle.remove()
    scale = 2 / total.item()
    added = torch.diag((noise * scale).float())
    return Statistics(hessian * scale + added, -added)
