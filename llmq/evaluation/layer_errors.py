"""What quantizing one linear does to its outputs, for the inputs that the original model gives it.

weight   tr(E H E^T) / tr(W H W^T)       E = W_hat - W, H = second moments of the inputs: of the mean square of the outputs,
the share by which rounding the weight moves them
inputs   tr(W_hat D W_hat^T) / tr(W H W^T)    D = second moments of what rounding the inputs to int8 or float8 changes in
them, where the format does; the product of both errors is left out, for they hardly know of
each other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.algorithms.metric import Metric
from llmq.calibration.gather import Upstream, input_hessians
from llmq.calibration.hessian import Hessian, inputs_of
from llmq.calibration.partial import fqn_of, linears_of
from llmq.evaluation.leave_one_out import Resumed
from llmq.evaluation.originals import Original
from llmq.numerics.grid import Activation, LinearFormat
from llmq.ops.reference import quantize_activation

Rounding = tuple[Activation, Tensor | None]
"""How inputs are rounded, and the scale of static ones."""


@dataclass(frozen=True, slots=True)
class OutputError:
    """Shares of the outputs' mean square; see the module."""

    weight: float
    inputs: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.weight + self.inputs


@dataclass(frozen=True, eq=False)
class RoundedInputs:
    """Second moments of what rounding changes in inputs x: d = x_hat - x.

    Attributes:
        square: D = 2/n sum d^T d, fp32 [K, K].
        cross: C = 2/n sum d^T x, fp32 [K, K].
    """

    square: Tensor
    cross: Tensor


@dataclass(frozen=True, eq=False)
class LinearInputs:
    """Second moments of what one linear reads, in the quantized model's coordinates.

    Attributes:
        hessian: H = 2/n sum x^T x, fp32 [K, K].
        rounding: what rounding changes, by the grid of the activations.
        calibration: H of the calibration windows, where a candidate needs it.
    """

    hessian: Tensor
    rounding: Mapping[Activation, RoundedInputs]
    calibration: Tensor | None = None

    def error(self, original: Tensor, quantized: Tensor, form: LinearFormat) -> OutputError:
        """Return what a quantized weight in this format costs; both weights fp32 [N, K]. Without outputs there is no error."""
        outputs = Metric(self.hessian).loss(original)
        if outputs <= 0:
            return OutputError(0.0)
        error, added = quantized - original, 0.0
        if form.activation is not None:
            rounded = self.rounding[form.activation]
            both = ((quantized @ rounded.cross) * error).sum(dtype=torch.float64).item()
            added = Metric(rounded.square).loss(quantized) + 2 * both
        return OutputError(Metric(self.hessian).loss(error) / outputs, added / outputs)


def linear_inputs(
    held: Resumed,
    calibration: Resumed | None,
    originals: Mapping[str, Original],
    roundings: Callable[[str], Sequence[Rounding]],
) -> Iterator[tuple[str, LinearInputs]]:
    """Walk through the original model, and yield what each linear reads, in the model's order.

    Args:
        held: the original model at its first stage, with the windows that losses are measured on.
        calibration: the same with calibration windows; None: nobody needs them.
        originals: the linears that are asked for.
        roundings: says how a linear's inputs are rounded, now or by a candidate.
    """
    with torch.no_grad():
        for stage in held.stages:
            own = linears_of(stage, originals)
            if own:
                known = {name: originals[fqn_of(stage, name)] for name in own}
                hessians = input_hessians(own, held.run_stage, held.states)
                others = input_hessians(own, calibration.run_stage, calibration.states) if calibration is not None else {}
                rounded = _rounding_moments(held, own, known, {name: roundings(fqn_of(stage, name)) for name in own})
                for name, original in known.items():
                    other = others.get(name)
                    yield (
                        fqn_of(stage, name),
                        LinearInputs(
                            original.hessian(hessians[name]),
                            rounded[name],
                            None if other is None else original.hessian(other),
                        ),
                    )
            held.advance()
            if calibration is not None:
                calibration.advance()


class _Sums:
    """The running sums of one linear and grid."""

    def __init__(self) -> None:
        self.square, self.cross = Hessian(), Upstream()

    def add(self, x: Tensor, rounded: Tensor) -> None:
        self.square.add(rounded - x)
        self.cross.add(rounded)
        self.cross.add(x)

    def value(self) -> RoundedInputs:
        cross = self.cross.value(self.square.rows)
        return RoundedInputs(self.square.value(), cross)


def _rounding_moments(
    held: Resumed, linears: Mapping[str, nn.Linear], originals: Mapping[str, Original], asked: Mapping[str, Sequence[Rounding]]
) -> dict[str, dict[Activation, RoundedInputs]]:
    """Return the moments of each linear and grid that is asked for; the stage only runs where one is."""
    sums = {name: {grid: _Sums() for grid, _ in each} for name, each in asked.items()}

    def see(name: str, x: Any) -> None:
        inputs = originals[name].inputs(x.reshape(-1, x.shape[-1]))
        for grid, scale in asked[name]:
            codes, steps = quantize_activation(inputs, grid, scale)
            sums[name][grid].add(inputs, codes * steps)

    if any(asked.values()):
        with inputs_of({name: linear for name, linear in linears.items() if asked[name]}, see):
            for h in held.states:
                held.run_stage(h)
    return {name: {grid: each.value() for grid, each in own.items()} for name, own in sums.items()}
