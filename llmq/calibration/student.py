"""A quantized model that learns: its gradients by scales, zero points and norms, a few windows at a time.

At any time there are one block in fp32 with the gradients of its weights, the hidden states of those windows between blocks,
and the trained numbers. Codes are read where they lie whenever a block is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.algorithms.distillation import TrainedGrid, TrainedVector
from llmq.calibration.activations import BATCH_TOKENS
from llmq.calibration.backward import FloatHead, backward_through_head, float_values
from llmq.calibration.embedded import embedded
from llmq.calibration.stages import EMBEDDING, HEAD, BlockModel, Keeper, Stage, stages_of
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.tensor import QuantizedTensor

Loss = Callable[[Tensor, slice], Tensor]
"""Maps logits [R, V], and which rows of the micro-batch they are, to a sum over those rows."""


@dataclass
class _Part:
    """What is trained of one block, or of the head, by the parameter's name inside it."""

    stage: Stage
    grids: dict[str, TrainedGrid] = field(default_factory=dict)
    vectors: dict[str, TrainedVector] = field(default_factory=dict)


@dataclass
class _Run:
    """A block that ran with a graph."""

    block: nn.Module
    leaf: Tensor
    out: Tensor


class Student:
    """The quantized model.

    Attributes:
        hold: keep the graphs of all blocks between going forwards and backwards, for models that are small, instead of
            running each block twice. The gradients are the same bits.
    """

    def __init__(self, model: BlockModel, keeper: Keeper, *, norms: bool = True, hold: bool = False) -> None:
        """Find out what can be trained.

        Args:
            model: the quantized model.
            keeper: brings each part's quantized parameters when it is asked to `restore` it.
            norms: train the weights of norms too.
            hold: see the class.
        """
        self._model, self._keeper, self.hold = model, keeper, hold
        stages = stages_of(model, [])
        self._blocks = [_Part(stage) for stage in stages if not stage.is_head]
        self._head = _Part(next(stage for stage in stages if stage.is_head))
        for part in self._parts():
            self._keeper.restore(part.stage.name)
            for name, parameter in self._candidates(part):
                if isinstance(parameter, QuantizedTensor) and isinstance(parameter.format.weight, IntGrid):
                    part.grids[name] = TrainedGrid(parameter.weight)
                elif norms and parameter.ndim == 1 and name.endswith("weight"):
                    part.vectors[name] = TrainedVector(parameter)
            self._keeper.leave(part.stage.name)
        self._context: Any = None
        self._context_length = 0

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def groups(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the trained tensors: of scales, of zero points, of norms."""
        grids = [grid for part in self._parts() for grid in part.grids.values()]
        vectors = [vector.change for part in self._parts() for vector in part.vectors.values()]
        return [grid.scale_change for grid in grids], [grid.masters()[1] for grid in grids if len(grid.masters()) > 1], vectors

    def masters(self) -> list[Tensor]:
        """Return all trained tensors."""
        return [tensor for group in self.groups() for tensor in group]

    def weights(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield each trained linear's fully qualified name and its weight as it is now, on the CPU."""
        for part in self._parts():
            self._keeper.restore(part.stage.name)
            for name, parameter in self._candidates(part):
                if name in part.grids:
                    assert isinstance(parameter, QuantizedTensor)
                    yield _fqn(part, name).removesuffix(".weight"), part.grids[name].apply(parameter.weight).to("cpu")
            self._keeper.leave(part.stage.name)

    def norms(self) -> dict[str, Tensor]:
        """Return the trained norms' weights as they are now, in their dtypes, on the CPU, by the names of their parameters."""
        return {_fqn(part, name): vector.value().cpu() for part in self._parts() for name, vector in part.vectors.items()}

    def batches(self, count: int, length: int) -> list[slice]:
        """Return how many windows of `length` tokens go through the blocks at once."""
        step = max(1, BATCH_TOKENS // length)
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def evaluate(self, windows: Tensor, loss: Loss) -> float:
        """Return the summed loss of windows [B, T]."""
        h = self._embed(windows)
        for part in self._blocks:
            h = part.stage.forward(self._block(part), h, self._context)
            self._keeper.leave(part.stage.name)
        head = self._float_head()
        rows = h.reshape(-1, h.shape[-1])
        told: list[float] = torch.stack([loss(head(rows[part]), part) for part in head.chunks(rows)]).tolist()
        return sum(told)

    def backward(self, windows: Tensor, loss: Loss) -> float:
        """Add the gradients of the summed loss of windows [B, T] to the `grad` of every trained tensor, and return it."""
        h = self._embed(windows)
        states: list[Tensor] = []
        runs: list[_Run] = []
        for part in self._blocks:
            if self.hold:
                runs.append(self._run(part, h))
                h = runs[-1].out.detach()
            else:
                states.append(h)
                h = part.stage.forward(self._block(part), h, self._context)
                self._keeper.leave(part.stage.name)
        head = self._float_head()
        leaves = {name: nn.Parameter(head.parameters()[name].detach()) for name in (*self._head.grids, *self._head.vectors)}
        for name, leaf in leaves.items():
            head.replace(name, leaf)
        gradient, total = backward_through_head(head, h, loss)
        self._collect(self._head, leaves)
        for part in reversed(self._blocks):
            run = runs.pop() if self.hold else self._run(part, states.pop())
            run.out.backward(gradient)  # type: ignore[no-untyped-call]  # torch's own gap
            assert run.leaf.grad is not None
            gradient = run.leaf.grad
            self._collect(part, dict(run.block.named_parameters()))
        return total

    def _parts(self) -> list[_Part]:
        return [*self._blocks, self._head]

    def _candidates(self, part: _Part) -> list[tuple[str, nn.Parameter]]:
        """Return a part's parameters as they are in the model."""
        module = part.stage.module
        if not part.stage.is_head:
            return list(module.named_parameters())
        elsewhere = {id(p) for block in self._model.blocks for p in block.parameters()}
        elsewhere |= {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [(name, parameter) for name, parameter in module.named_parameters() if id(parameter) not in elsewhere]

    def _embed(self, windows: Tensor) -> Tensor:
        self._keeper.restore(EMBEDDING)
        h = embedded(self._model, windows).float()
        if self._context_length != windows.shape[1]:
            self._context, self._context_length = self._model.context(h[:1]), windows.shape[1]
        self._keeper.leave(EMBEDDING)
        return h

    def _run(self, part: _Part, h: Tensor) -> _Run:
        """Run a block with a graph."""
        block = self._block(part)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in part.grids or name in part.vectors)
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            out = part.stage.forward(block, leaf, self._context)
        self._keeper.leave(part.stage.name)
        return _Run(block, leaf, out)

    def _block(self, part: _Part) -> nn.Module:
        """Return a copy of a block in fp32 with the numbers that are stored at this point of the training."""
        self._keeper.restore(part.stage.name)
        module = part.stage.module
        memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
        work = copy.deepcopy(module, memo)
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(work.get_submodule(owner), leaf, nn.Parameter(_now(part, name, parameter), requires_grad=False))
        return work

    def _float_head(self) -> FloatHead:
        self._keeper.restore(HEAD)
        head = FloatHead(self._model)
        for name, parameter in self._candidates(self._head):
            if name in self._head.grids or name in self._head.vectors:
                head.replace(name, nn.Parameter(_now(self._head, name, parameter), requires_grad=False))
        self._keeper.leave(HEAD)
        return head

    def _collect(self, part: _Part, leaves: dict[str, nn.Parameter]) -> None:
        """Turn gradients by a part's numbers into those by the trained tensors."""
        if part.grids:
            self._keeper.restore(part.stage.name)
            now = dict(self._candidates(part))
            for name, grid in part.grids.items():
                stored, by_weight = now[name], leaves[name].grad
                assert isinstance(stored, QuantizedTensor)
                assert by_weight is not None
                by_scale, by_zero = grid.gradients(stored.weight, by_weight)
                _add(grid.scale_change, by_scale)
                if grid.zero_change is not None and by_zero is not None:
                    _add(grid.zero_change, by_zero)
            self._keeper.leave(part.stage.name)
        for name, vector in part.vectors.items():
            by_value = leaves[name].grad
            assert by_value is not None
            _add(vector.change, vector.gradient(by_value))


def _now(part: _Part, name: str, parameter: Tensor) -> Tensor:
    """Return a parameter's numbers in fp32 at this point of the training."""
    if name in part.grids:
        assert isinstance(parameter, QuantizedTensor)
        return part.grids[name].apply(parameter.weight).dequantize()
    if name in part.vectors:
        return part.vectors[name].value().float()
    return float_values(parameter)


def _add(tensor: Tensor, gradient: Tensor) -> None:
    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)


def _fqn(part: _Part, name: str) -> str:
    return f"{part.stage.prefix}.{name}" if part.stage.prefix else name
