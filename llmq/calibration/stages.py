"""The parts of a model that are quantized one after another: its blocks, and the head where it is quantized too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.algorithms.report import LayerReport
from llmq.errors import UsageError
from llmq.numerics.grid import Activation
from llmq.ops.reference import quantize_activation
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import plain_weight
from llmq.schemes.block import EMBEDDING, HEAD
from llmq.schemes.cover import Decision

__all__ = ["EMBEDDING", "HEAD", "BlockModel", "InMemory", "Keeper", "Stage", "block_model", "stages_of"]


class BlockModel(Protocol):
    """What the walk needs of a model; `llmq.model.llama.Llama` has it."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order; each maps (h, context) to h."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return h [B, T, hidden] of tokens [B, T]."""
        ...

    def context(self, h: Tensor) -> Any:
        """Return what blocks need besides `h`; it depends on h's shape and dtype only."""
        ...

    def head(self, h: Tensor) -> Tensor:
        """Return logits of `h` after the last block."""
        ...


class Keeper(Protocol):
    """Who has the parameters: the walk opens a part before it uses it, and closes it when it is final."""

    def open(self, part: str) -> None:
        """See to it that the part's original parameters are in the model, with values."""
        ...

    def close(self, part: str, reports: list[LayerReport]) -> None:
        """Take the part as it is in the model now for its final state; its parameters need not stay."""
        ...

    def leave(self, part: str) -> None:
        """Let go of an opened part that has not changed."""
        ...

    def finished(self, part: str) -> list[LayerReport] | None:
        """Return the reports of a part that an earlier run closed; None: it is still to be done."""
        ...

    def restore(self, part: str) -> None:
        """Put the final parameters of a part that an earlier run closed into the model; `leave` lets go of them."""
        ...


class InMemory:
    """The keeper of a model that is in memory whole, and stays there."""

    def open(self, part: str) -> None:
        """See `Keeper.open`."""

    def close(self, part: str, reports: list[LayerReport]) -> None:
        """See `Keeper.close`."""

    def leave(self, part: str) -> None:
        """See `Keeper.leave`."""

    def finished(self, part: str) -> list[LayerReport] | None:  # noqa: ARG002
        """See `Keeper.finished`."""
        return None

    def restore(self, part: str) -> None:
        """See `Keeper.restore`."""


@dataclass(frozen=True)
class Stage:
    """A part of the model that is quantized at a time.

    Attributes:
        name: of the part, for the keeper.
        prefix: what comes before a linear's name inside `module` in its fully qualified name, without the dot.
        module: what owns the linears.
        forward: maps (module, h, context) to h.
        targets: what to quantize, by the linear's name inside `module`.
        decisions: every decision about a parameter of this part that is a linear's.
    """

    name: str
    prefix: str
    module: nn.Module
    forward: Callable[[nn.Module, Tensor, Any], Tensor]
    targets: dict[str, Decision]
    decisions: tuple[Decision, ...]

    @property
    def is_head(self) -> bool:
        """Whether it is the last: it works on the model itself in its own dtype, and nothing comes after it."""
        return self.name == HEAD

    def float_copy(self) -> nn.Module:
        """Return a copy of the module in fp32, with plain weights: the values as they are now, and no kernel's rounding.

        A linear whose format quantizes its inputs computes with rounded inputs: what comes after it will see their errors.
        """
        if self.is_head:
            return self.module
        work = _skeleton(self.module)
        for name, parameter in self.module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if isinstance(parameter, QuantizedTensor) and parameter.format.quantized:
                plain = parameter.weight.dequantize()
            else:
                plain = plain_weight(parameter).to(torch.float32, copy=True)  # an fp32 model's own memory must not change
            linear = work.get_submodule(owner)
            setattr(linear, leaf, nn.Parameter(plain, requires_grad=False))
            if isinstance(parameter, QuantizedTensor) and parameter.format.activation is not None:
                linear.register_forward_pre_hook(_rounding_inputs(parameter.format.activation, parameter.weight.input_scale))
        return work


def block_model(model: nn.Module) -> BlockModel:
    """Return the model as a `BlockModel`; raises UsageError when it is none."""
    missing = [name for name in ("blocks", "embed", "context", "head") if not hasattr(model, name)]
    if missing:
        raise UsageError(
            f"block by block calibration needs a model with blocks, embed, context and head (as llmq.model.llama.Llama has); "
            f"{type(model).__name__} has no {', '.join(missing)}. Give quantize_ the Hessians in `statistics` instead."
        )
    walked: BlockModel = model  # type: ignore[assignment]  # checked above
    return walked


def stages_of(model: BlockModel, decisions: Sequence[Decision]) -> list[Stage]:
    """Cut the model into its blocks and the head, each with the linears that are to be quantized there."""
    assert isinstance(model, nn.Module)
    names = {id(module): name for name, module in model.named_modules()}
    by_linear = {id(decision.linear): decision for decision in decisions if decision.linear is not None}
    stages = []
    for block in model.blocks:
        own = {name: by_linear.pop(id(module)) for name, module in block.named_modules() if id(module) in by_linear}
        prefix = names[id(block)]
        stages.append(Stage(prefix, prefix, block, _run_block, _targets(own), tuple(own.values())))
    own = {name: by_linear[id(module)] for name, module in model.named_modules() if id(module) in by_linear}
    dtype = next(model.parameters()).dtype
    stages.append(Stage(HEAD, "", model, lambda _, h, __: model.head(h.to(dtype)), _targets(own), tuple(own.values())))
    return stages


def _rounding_inputs(grid: Activation, scale: Tensor | None) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def rounded(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0]
        codes, steps = quantize_activation(x.reshape(-1, x.shape[-1]), grid, scale)
        return (codes * steps).reshape(x.shape)

    return rounded


def _run_block(module: nn.Module, h: Tensor, context: Any) -> Tensor:
    out: Tensor = module(h, context)
    return out


def _targets(decisions: dict[str, Decision]) -> dict[str, Decision]:
    return {
        name: decision
        for name, decision in decisions.items()
        if decision.scheme is not None and decision.format is not None and decision.format.quantized
    }


def _skeleton(module: nn.Module) -> nn.Module:
    """Return a copy that shares the parameters, which the caller replaces: nothing large is copied."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, memo)
