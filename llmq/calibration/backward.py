"""Backwards through a model that is not in memory: block by block, with only hidden states kept between blocks.

    windows -> embed -> h_0 -> block 0 -> h_1 -> … -> block L-1 -> h_L -> head -> loss
                         g_0 <-            g_1 <-               <- g_L <-

Each block runs as a copy in fp32, once forwards without a graph, and once more with one when the gradient by its output is
there. The head runs over a few rows at a time, so that the logits of all tokens are never there at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibration.activations import Activations, Spill, brought
from llmq.calibration.embedded import embed_windows
from llmq.calibration.stages import EMBEDDING, HEAD, BlockModel, Keeper, Stage
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import plain_weight

HEAD_LOGITS = 1 << 22
"""Logits that are computed at once: 16 MiB in fp32, and three or four such tensors at a time."""


class FloatHead:
    """What comes after the last block, as a copy in fp32: rows [R, hidden] to logits [R, V]."""

    def __init__(self, model: BlockModel) -> None:
        assert isinstance(model, nn.Module)
        # Blocks and embeddings are left out, and parameters shared; a head that is tied to an embedding keeps its values.
        memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        memo |= {id(module): module for module in model.modules() if isinstance(module, nn.Embedding)}
        memo[id(model.blocks)] = nn.ModuleList()
        self._model: Any = copy.deepcopy(model, memo)
        for name, owner in _owners(self._model):
            setattr(owner, name, nn.Parameter(float_values(getattr(owner, name)), requires_grad=False))
        self._chunk: int | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return its parameters by their fully qualified names in the model, without embeddings."""
        names = {id(module): name for name, module in self._model.named_modules()}
        return {f"{names[id(owner)]}.{name}".lstrip("."): getattr(owner, name) for name, owner in _owners(self._model)}

    def replace(self, name: str, parameter: nn.Parameter) -> None:
        """Put another parameter in the place of the one of `parameters` that has this name."""
        owner, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(owner), leaf, parameter)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return logits [R, V] of hidden states [R, hidden] after the last block."""
        logits: Tensor = self._model.head(rows[None])
        return logits[0]

    def chunks(self, rows: Tensor) -> Iterator[slice]:
        """Yield slices of `rows` [R, hidden] whose logits are few enough to be held."""
        if self._chunk is None:
            self._chunk = max(1, HEAD_LOGITS // self(rows[:1].detach()).shape[-1])
        for start in range(0, len(rows), self._chunk):
            yield slice(start, min(start + self._chunk, len(rows)))


def backward_through_head(head: FloatHead, h: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, float]:
    """Return the gradient of a summed loss by hidden states.

    Parameters of the head that require a gradient get theirs added to.

    Args:
        head: the head.
        h: [B, T, hidden] fp32 after the last block.
        loss: maps logits [R, V] of some of the B * T rows, and which rows they are, to a scalar.

    Returns:
        [B, T, hidden] fp32, and the loss.
    """
    rows = h.detach().reshape(-1, h.shape[-1])
    gradient = torch.empty_like(rows)
    values = []
    for part in head.chunks(rows):
        leaf = rows[part].requires_grad_()
        with torch.enable_grad():
            value = loss(head(leaf), part)
        value.backward()  # type: ignore[no-untyped-call]  # torch's own gap
        assert leaf.grad is not None
        gradient[part] = leaf.grad
        values.append(value.detach())  # read once all are on their way: a GPU is not waited for in between
    return gradient.view(h.shape), sum(torch.stack(values).tolist())


class Boundaries:
    """The hidden states before every block, for all windows: kept in memory or on disk, or computed again from the last kept.

    With every state kept, L + 1 sets of activations lie there; with every s-th one, about L / s + s, for one more pass
    forwards through the blocks.
    """

    def __init__(
        self, model: BlockModel, stages: Sequence[Stage], keeper: Keeper, *, every: int | None = 1, spill: Spill = None
    ) -> None:
        """Take note of how; `fill` computes.

        Args:
            model: what embeds.
            stages: the blocks.
            keeper: who has the parameters.
            every: keep the states before every so many-th block; None: only those after the last.
            spill: where states lie.
        """
        self._model, self._stages, self._keeper = model, stages, keeper
        self._every, self._spill = every, spill
        self._kept: dict[int, Activations] = {}
        self.context: Any = None

    def fill(self, windows: Tensor, dtype: torch.dtype, go: Callable[[int], None]) -> Activations:
        """Run all windows through all blocks.

        Args:
            windows: integers [n, T].
            dtype: in which states are kept.
            go: hears of each window that went through a block.

        Returns:
            The states after the last block.
        """
        self._keeper.open(EMBEDDING)
        states, self.context = embed_windows(self._model, windows, dtype, spill=self._spill)
        self._keeper.leave(EMBEDDING)
        return self._forward(states, range(len(self._stages)), self._every, go)

    def pop(self, index: int, go: Callable[[int], None]) -> Activations:
        """Return the states before block `index`, and forget them; blocks are asked for from the last to the first.

        Args:
            index: of the block.
            go: hears of each window that went through a block again.
        """
        if index not in self._kept:
            base = max(kept for kept in self._kept if kept < index)
            # the base is needed later: a copy of it goes forwards
            self._kept[index] = self._forward(self._kept[base].like(spill=self._spill), range(base, index), 1, go)
        return self._kept.pop(index)

    def _forward(self, states: Activations, blocks: range, every: int | None, go: Callable[[int], None]) -> Activations:
        """Run states through blocks, in place, but for those before every so many-th block, which are kept."""
        for index in blocks:
            if every is not None and index % every == 0 and index not in self._kept:
                self._kept[index] = states
                states = states.like(spill=self._spill)
            with opened(self._keeper, self._stages[index]) as block:
                for batch in states.batches:
                    batch.copy_(self._stages[index].forward(block, brought(batch, states.device), self.context))
                    go(len(batch))
        return states


def float_values(parameter: Tensor) -> Tensor:
    """Return the numbers of a parameter in fp32, quantized or not; an fp32 parameter's own memory is shared."""
    if isinstance(parameter, QuantizedTensor) and parameter.format.quantized:
        return parameter.weight.dequantize()
    return plain_weight(parameter).float()


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return each parameter's name in the module that owns it, and that module, but for embeddings."""
    return [
        (name, owner)
        for owner in model.modules()
        if not isinstance(owner, nn.Embedding)
        for name, _ in owner.named_parameters(recurse=False)
    ]


class opened:  # noqa: N801 - a context manager, read like a function
    """`with opened(keeper, stage) as block:` a copy of a block in fp32, while its parameters are there."""

    def __init__(self, keeper: Keeper, stage: Stage) -> None:
        self._keeper, self._stage = keeper, stage

    def __enter__(self) -> nn.Module:
        self._keeper.open(self._stage.name)
        return self._stage.float_copy()

    def __exit__(self, *_: object) -> None:
        self._keeper.leave(self._stage.name)


def open_head(model: BlockModel, keeper: Keeper) -> FloatHead:
    """Return the head as a copy in fp32."""
    keeper.open(HEAD)
    head = FloatHead(model)
    keeper.leave(HEAD)
    return head
