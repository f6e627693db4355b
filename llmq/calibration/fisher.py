"""Fisher factors of a model's linears from back-propagated samples, in one visit to each block.

The labels are drawn from the model's own distribution, with a generator for each window. Going backwards, a block runs once for
each round of power iteration over all windows; its factors are final, and handed on, before the block in front of it is
touched. So at any time there are one block in fp32, its sums, and the activations (see `backward`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.algorithms.fisher import FactorSums, FisherFactors, sample_labels, window_uniforms
from llmq.calibration.activations import Activations, Spill, activation_dtype, brought
from llmq.calibration.backward import Boundaries, FloatHead, backward_through_head, open_head, opened
from llmq.calibration.stages import BlockModel, InMemory, Keeper, Stage, block_model, stages_of
from llmq.errors import SchemeError, UsageError
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks

Sink = Callable[[str, Tensor, Tensor], None]
"""Takes a linear's fully qualified name, H_I [K, K] and H_O [N, N], both fp32."""


@dataclass(frozen=True)
class FisherSettings:
    """How factors are estimated.

    Attributes:
        rounds: of power iteration, from the identity; 1 or 2 are usual.
        seed: of the labels.
        activations: dtype of the hidden states between blocks, 'bf16' or 'fp32'.
        gradients: dtype of the gradients between blocks.
        every: hidden states are kept before every so many-th block, and computed again elsewhere; 1: before each.
        spill: where hidden states and gradients lie.
        ranks: the processes that share the windows.
    """

    rounds: int = 1
    seed: int = 0
    activations: str = "bf16"
    gradients: str = "bf16"
    every: int = 1
    spill: Spill = None
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"power iteration takes at least 1 round, got {self.rounds}.")
        if self.every < 1:
            raise UsageError(f"hidden states are kept before every block or every few blocks, got every {self.every}.")


def fisher_factors(
    model: nn.Module,
    tokens: Tensor,
    linears: Collection[str],
    sink: Sink,
    *,
    settings: FisherSettings | None = None,
    keeper: Keeper | None = None,
    progress: Progress = SILENT,
) -> None:
    """Estimate the Fisher factors of linears; see `algorithms.fisher` for what they are and for their size.

    Args:
        model: a `BlockModel` with its original weights.
        tokens: windows of all processes, integers [n, T].
        linears: fully qualified names, all of them inside blocks.
        sink: is handed the factors of a linear as soon as they are final, from the last block to the first. Every process
            hands on the same ones.
        settings: see `FisherSettings`.
        keeper: who has the parameters; None: the model itself.
        progress: hears of each window that went through a block, forwards or backwards.

    Raises:
        SchemeError: gradients are not finite, or a linear did not run when its block did.
        UsageError: a linear is in no block, or the model is no `BlockModel`.
    """
    _Backward(block_model(model), settings or FisherSettings(), keeper or InMemory()).run(tokens, set(linears), sink, progress)


class _Backward:
    def __init__(self, model: BlockModel, settings: FisherSettings, keeper: Keeper) -> None:
        self.model, self.settings, self.keeper = model, settings, keeper
        self.stages = [stage for stage in stages_of(model, []) if not stage.is_head]

    def run(self, tokens: Tensor, wanted: set[str], sink: Sink, progress: Progress) -> None:
        own = [_linears(stage, wanted) for stage in self.stages]
        _check_found(wanted, own)
        settings, keeper = self.settings, self.keeper
        share = settings.ranks.share(len(tokens))
        windows = tokens[share.start : share.stop]
        first = next((index for index, names in enumerate(own) if names), len(own))
        boundaries = Boundaries(self.model, self.stages, keeper, every=settings.every, spill=settings.spill)
        again = len(own) - -(-len(own) // settings.every) if settings.every > 1 else 0
        total = len(windows) * (len(own) + again + 1 + settings.rounds * (len(own) - first))
        with torch.no_grad(), progress.task("Fisher factors, block by block", total) as go:
            last = boundaries.fill(windows, activation_dtype(settings.activations), go)
            gradients = self._through_head(last, share, go)
            for index in reversed(range(first, len(own))):
                stage, states = self.stages[index], boundaries.pop(index, go)
                with opened(keeper, stage) as block:
                    run = lambda h, block=block, stage=stage: stage.forward(block, h, boundaries.context)  # noqa: E731
                    factors = self._rounds(_modules(block, own[index]), run, states, gradients, go)
                for name, fqn in own[index].items():
                    found = factors.pop(name)
                    sink(fqn, found.inputs, found.outputs)

    def _through_head(self, states: Activations, share: range, go: Callable[[int], None]) -> Activations:
        """Draw labels, and return the gradients by the states after the last block."""
        head: FloatHead = open_head(self.model, self.keeper)
        n, length, hidden = states.states.shape
        dtype, device = activation_dtype(self.settings.gradients), states.device
        gradients = Activations((n, length, hidden), dtype, spill=self.settings.spill, device=device)
        window = share.start
        for h, out in zip(states.batches, gradients.batches, strict=True):
            drawn = torch.cat([window_uniforms(self.settings.seed, window + i, length) for i in range(len(h))]).to(device)

            def loss(logits: Tensor, rows: slice, uniforms: Tensor = drawn) -> Tensor:
                labels = sample_labels(logits.detach(), uniforms[rows])
                return F.cross_entropy(logits, labels, reduction="sum")

            gradient, _ = backward_through_head(head, brought(h, device), loss)
            out.copy_(gradient)
            window += len(h)
            go(len(h))
        return gradients

    def _rounds(
        self,
        linears: dict[str, nn.Linear],
        run: Callable[[Tensor], Tensor],
        states: Activations,
        gradients: Activations,
        go: Callable[[int], None],
    ) -> dict[str, FisherFactors]:
        """Go backwards through a block once a round; the last time, the gradients become those by its input."""
        factors: dict[str, FisherFactors] = {}
        for number in range(self.settings.rounds):
            sums = {
                name: FactorSums((linear.out_features, linear.in_features), linear.weight, factors.pop(name, None))
                for name, linear in linears.items()
            }
            for h, g in zip(states.batches, gradients.batches, strict=True):
                by_input = _backward(linears, run, brought(h, states.device), brought(g, states.device), sums)
                if number == self.settings.rounds - 1:
                    g.copy_(by_input)
                go(len(h))
            for name in linears:
                own = sums.pop(name)
                for tensor in own.tensors():
                    self.settings.ranks.sum_(tensor)
                factors[name] = _finite(own.finish(), name)
        return factors


def _backward(
    linears: dict[str, nn.Linear],
    run: Callable[[Tensor], Tensor],
    h: Tensor,
    g: Tensor,
    sums: dict[str, FactorSums],
) -> Tensor:
    """Run one batch forwards and backwards, add each linear's inputs and gradients to its sums, and return that by `h`."""
    with torch.enable_grad(), _calls_of(linears) as calls:
        leaf = h.requires_grad_()
        out = run(leaf)
        found = torch.autograd.grad(out, [leaf, *(y for _, _, y in calls)], g)
    for (name, x, _), gradient in zip(calls, found[1:], strict=True):
        sums[name].add(x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
    silent = linears.keys() - {name for name, _, _ in calls}
    if silent:
        raise SchemeError(
            f"{', '.join(sorted(silent))} did not run when the block did, so its Fisher information is not known; skip it."
        )
    return found[0]


@contextmanager
def _calls_of(linears: dict[str, nn.Linear]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Note name, input and output of every call of the linears."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def listen(name: str) -> Any:
        return lambda _, args, y: calls.append((name, args[0].detach(), y))

    handles = [linear.register_forward_hook(listen(name)) for name, linear in linears.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _linears(stage: Stage, wanted: set[str]) -> dict[str, str]:
    """Return the wanted linears of a block: their fully qualified names, by their names inside it."""
    names = {name: f"{stage.prefix}.{name}" for name, module in stage.module.named_modules() if isinstance(module, nn.Linear)}
    return {name: fqn for name, fqn in names.items() if fqn in wanted}


def _modules(block: nn.Module, names: Collection[str]) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if name in names and isinstance(module, nn.Linear)}


def _check_found(wanted: set[str], own: list[dict[str, str]]) -> None:
    missing = wanted - {fqn for names in own for fqn in names.values()}
    if missing:
        raise UsageError(
            f"{', '.join(sorted(missing))} is no linear of a block, and only those have Fisher factors "
            "(a head's would need a matrix of vocabulary by vocabulary); leave it out."
        )


def _finite(factors: FisherFactors, name: str) -> FisherFactors:
    if not (torch.isfinite(factors.inputs.diagonal()).all() and torch.isfinite(factors.outputs.diagonal()).all()):
        raise SchemeError(f"the gradients of {name} are not finite; the model is broken before it is quantized.")
    return factors
