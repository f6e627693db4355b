"""The original's weights as a quantized model would have them: what takes a linear's place when it is put back.

A scheme may have folded scales of channels into a block before it rounded (AWQ, SmoothQuant; see `algorithms.folding`). The
linears then read inputs that were divided by s and have columns that were multiplied by it, and the original weight alone would
compute another function there. Behind a norm s is known exactly: the original norm's weight over the quantized model's. Between
two linears (v and o, up and down) nobody wrote it down, and it is estimated channel by channel, from both sides at once:

    rows     of the producer:  a = <w_hat, w> / <w, w>, which is 1/s but for rounding
    columns  of the consumer:  b = <w_hat, w> / <w, w>, which is s but for rounding          s = sqrt(b / a)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq.algorithms.folding import FoldPair, fold_pairs
from llmq.calibration.stages import BlockModel, block_model
from llmq.numerics.grid import LinearFormat
from llmq.numerics.weight import QuantizedWeight, float_grid
from llmq.ops.select import prepare
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import quantized_parameter


@dataclass(frozen=True, eq=False)
class Original:
    """A linear's original weight in the quantized model's coordinates.

    Attributes:
        parameter: the original's own weight [N, K], ready to run.
        shrunk: fp32 [N], what its rows are divided by in the quantized model; None: nothing.
        divided: fp32 [K], what the quantized model's inputs of this linear are divided by; None: they are the original's.
    """

    parameter: nn.Parameter
    shrunk: Tensor | None = None
    divided: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Fp32 [N, K]."""
        weight = numbers(self.parameter)
        weight = weight if self.divided is None else weight * self.divided
        return weight if self.shrunk is None else weight / self.shrunk[:, None]

    def hessian(self, h: Tensor) -> Tensor:
        """Return the second moments [K, K] of the inputs in these coordinates, for those of the original's inputs."""
        return h if self.divided is None else h / self.divided[:, None] / self.divided

    def inputs(self, x: Tensor) -> Tensor:
        """Return the original's inputs [..., K] in these coordinates, fp32."""
        return x.float() if self.divided is None else x.float() / self.divided

    def put_back(self) -> nn.Parameter:
        """Return what the quantized model's linear gets as its weight."""
        if self.divided is None and self.shrunk is None:
            return self.parameter
        dtype = self.parameter.dtype
        stored = QuantizedWeight.from_float(self.weight.to(dtype))
        return ready(quantized_parameter(stored, LinearFormat(float_grid(dtype)), dtype))


def weight_of(module: nn.Module, name: str) -> nn.Parameter:
    """Return the weight of a linear inside a module."""
    weight = module.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def numbers(weight: Tensor) -> Tensor:
    """Return what a linear's weight means, fp32 [N, K]."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach().float()


def ready(weight: nn.Parameter) -> nn.Parameter:
    """Return a quantized weight laid out for the kernels that run it here."""
    holder = nn.Module()
    holder.register_parameter("weight", weight)
    prepare(holder)
    found = holder.weight
    assert isinstance(found, nn.Parameter)
    return found


def originals_of(quantized: nn.Module, original: nn.Module, fqns: Collection[str], *, folded: bool) -> dict[str, Original]:
    """Return the original weight of each linear, as the quantized model would have it.

    Args:
        quantized: the quantized model.
        original: the model it was made from, in the same compute dtype.
        fqns: names of linears that both have.
        folded: scales may have been folded in; False: the weights are the original's.
    """
    found = {fqn: Original(weight_of(original, fqn)) for fqn in fqns}
    if not folded:
        return found
    names = {id(module): name for name, module in quantized.named_modules()}
    model: BlockModel = block_model(quantized)
    for owner in (*model.blocks, quantized):
        prefix = names[id(owner)] + "." if owner is not quantized else ""
        own = {fqn.removeprefix(prefix) for fqn in fqns if fqn.startswith(prefix)}
        if owner is quantized:
            own &= {"lm_head"}
        if own:
            _unfold(owner, original.get_submodule(prefix.rstrip(".")), prefix, own, found)
    return found


def _unfold(quantized: nn.Module, original: nn.Module, prefix: str, own: set[str], found: dict[str, Original]) -> None:
    """Put the scales that were folded into one block into its original weights; pairs come in the order of their calls."""
    for pair in fold_pairs(quantized, own):
        scale = _norm_scale(quantized, original, pair) if pair.norm else _linear_scale(quantized, prefix, pair, found)
        if not pair.norm:
            fqn = prefix + pair.producer
            found[fqn] = replace(found[fqn], shrunk=scale)
        for name in pair.consumers:
            found[prefix + name] = replace(found[prefix + name], divided=pair.expand(scale))


def _norm_scale(quantized: nn.Module, original: nn.Module, pair: FoldPair) -> Tensor:
    was, now = (module.get_submodule(pair.producer).weight for module in (original, quantized))
    assert isinstance(was, Tensor)
    assert isinstance(now, Tensor)
    wide = was.double() / now.double()
    return torch.where(torch.isfinite(wide) & (wide > 0), wide, 1.0).float()


def _linear_scale(quantized: nn.Module, prefix: str, pair: FoldPair, found: dict[str, Original]) -> Tensor:
    """Estimate the scale of each channel [C] between two linears; the producer's own inputs are divided already."""
    (name,) = pair.consumers
    rows, columns = found[prefix + pair.producer].weight, found[prefix + name].weight
    shrunk = (numbers(weight_of(quantized, pair.producer)) * rows).sum(1) / rows.square().sum(1)
    grown = pair.gather((numbers(weight_of(quantized, name)) * columns).sum(0)).sum(0)
    square = grown / pair.gather(columns.square().sum(0)).sum(0) / shrunk
    return torch.where(torch.isfinite(square) & (square > 0), square, 1.0).sqrt()
