"""How much the whole model changes when one linear is quantized one way or another: what mixed precision is solved from.

Two predictions of the same number, the Kullback-Leibler divergence from the original model's distribution, in nats per token:

    measured   the linear is quantized, nothing else is, and held-out windows go through the model. Nothing is assumed but that
               the changes of several linears add up. Hidden states before each block are kept, so a run starts at the block.
    fisher     tr(H_O E H_I E^T) / 2 with E = W_hat - W and the Kronecker factors of the linear's Fisher information (see
               `algorithms.fisher`): the second order of the same divergence, at the price of two small matrix products.

Each linear is quantized with its scheme's own algorithm, for the inputs that the original model gives it. What works on a block
as a whole (scales folded into norms, learning of rounding) is left out, for it is not one linear's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from llmq.algorithms.statistics import Needs, Statistics
from llmq.calibration.activations import activation_dtype
from llmq.calibration.embedded import embed_windows, embedded
from llmq.calibration.factors import Factors
from llmq.calibration.gather import input_hessians
from llmq.calibration.partial import changed, fqn_of, linears_of, run_from
from llmq.calibration.stages import BlockModel, block_model, stages_of
from llmq.errors import SchemeError, UsageError
from llmq.progress import SILENT, Progress
from llmq.schemes.apply import decide
from llmq.schemes.base import ResolvedScheme

Method = Literal["measured", "fisher"]
METHODS: tuple[Method, ...] = ("measured", "fisher")


@dataclass(frozen=True)
class Question:
    """What is to be found out.

    Attributes:
        candidates: schemes with their options, each with an integer grid.
        method: see the module.
        factors: where Fisher factors are; candidates or the method may need them.
        skip: names of linears that nobody will quantize.
        activations: dtype of the hidden states that statistics are gathered from: 'bf16' or 'fp32'.
    """

    candidates: Sequence[ResolvedScheme]
    method: Method = "measured"
    factors: Factors | None = None
    skip: Collection[str] = field(default_factory=frozenset)
    activations: str = "fp32"

    @property
    def needs(self) -> Needs:
        """What the candidates ask for."""
        needs = Needs.NONE
        for candidate in self.candidates:
            needs |= candidate.needs
        return needs

    @property
    def needs_factors(self) -> bool:
        """Whether Fisher factors are needed, by a candidate or by the method."""
        return self.method == "fisher" or Needs.FISHER in self.needs

    def factors_of(self, fqn: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return H_I [K, K] and H_O [N, N] of a linear on a device; raises SchemeError when there are none."""
        if self.factors is None:
            raise SchemeError(f"Fisher factors of {fqn} are needed and none are given; estimate them first.")
        inputs, outputs = self.factors.read(fqn)
        return inputs.to(device), outputs.to(device)


@dataclass(frozen=True)
class LinearSensitivity:
    """What was found out about one linear.

    Attributes:
        fqn: its name.
        shape: (N, K) of its weight.
        kl: predicted divergence in nats per token, by candidate; None where the candidate's grid does not fit the shape.
    """

    fqn: str
    shape: tuple[int, int]
    kl: tuple[float | None, ...]


def sensitivities(
    model: nn.Module, tokens: Tensor, held_out: Tensor, question: Question, *, progress: Progress = SILENT
) -> list[LinearSensitivity]:
    """Predict, for every linear and candidate, by how much the model would change.

    Args:
        model: a `BlockModel` in fp32 with its original weights; it is the same again afterwards.
        tokens: windows [n, T] that statistics are gathered from.
        held_out: windows [m, T] that the divergence is measured on; not used by the method 'fisher'.
        question: see `Question`.
        progress: hears of every linear and candidate.

    Returns:
        One entry for each linear, in the model's order.

    Raises:
        SchemeError: a linear does not run, or its inputs are not finite.
        UsageError: there is no candidate, one is no integer grid, or the model is not in fp32.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise UsageError(f"sensitivities are measured in fp32, got a model in {', '.join(sorted(map(str, dtypes)))}; load it so.")
    if not question.candidates:
        raise UsageError("there is nothing to compare: name at least one candidate scheme.")
    with torch.no_grad():
        return _Measurement(block_model(model), tokens, held_out, question).run(progress)


class _Measurement:
    def __init__(self, model: BlockModel, tokens: Tensor, held_out: Tensor, question: Question) -> None:
        assert isinstance(model, nn.Module)
        self.model, self.question = model, question
        named = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        skip = [name for name in named if name in question.skip]
        self.stages = stages_of(model, decide(model, question.candidates[0], skip=skip, skip_unfit=True))
        self.wanted = set(named) - set(skip)
        dtype = activation_dtype(question.activations)
        self.states = embed_windows(model, tokens, dtype)[0] if question.needs.calibration else None
        self.held_out = embed_windows(model, held_out, torch.float32)[0] if question.method == "measured" else None
        self.context = model.context(embedded(model, tokens[:1]).float())

    def run(self, progress: Progress) -> list[LinearSensitivity]:
        own = [linears_of(stage, self.wanted) for stage in self.stages]
        total = sum(map(len, own)) * len(self.question.candidates)
        self.reference = self._reference()
        found: list[LinearSensitivity] = []
        with progress.task(f"sensitivity ({self.question.method})", total) as go:
            for index, linears in enumerate(own):
                found += self._stage(index, linears, go)
        return found

    def _stage(self, index: int, linears: dict[str, nn.Linear], go: Callable[[int], None]) -> list[LinearSensitivity]:
        stage = self.stages[index]

        def run(h: Tensor) -> Tensor:
            return stage.forward(stage.module, h.float(), self.context)

        found: list[LinearSensitivity] = []
        hessians = input_hessians(linears, run, self.states.batches) if self.states is not None and linears else {}
        for name, linear in linears.items():
            fqn = fqn_of(stage, name)
            statistics = self._statistics(fqn, hessians.get(name))
            kl = []
            for candidate in self.question.candidates:
                kl.append(self._one(index, linear, (fqn, candidate), statistics))
                go(1)
            n, k = linear.weight.shape
            found.append(LinearSensitivity(fqn, (n, k), tuple(kl)))
        if not stage.is_head:
            for states in (self.states, self.held_out):
                for batch in states.batches if states is not None else ():
                    batch.copy_(run(batch))
        return found

    def _statistics(self, fqn: str, hessian: Tensor | None) -> Statistics | None:
        """Return what is known of a linear, where its inputs' moments are."""
        if hessian is None:
            return None
        needs = self.question.needs
        upstream = torch.zeros_like(hessian) if Needs.UPSTREAM in needs else None  # the inputs are the original's own
        if Needs.FISHER not in needs:
            return Statistics(hessian, upstream)
        return Statistics(hessian, upstream, *self.question.factors_of(fqn, hessian.device))

    def _one(
        self, index: int, linear: nn.Linear, what: tuple[str, ResolvedScheme], statistics: Statistics | None
    ) -> float | None:
        """Predict the divergence with one linear quantized; None where it does not fit."""
        fqn, candidate = what
        original = linear.weight.detach()
        if candidate.format.weight.misfit(*original.shape):
            return None
        quantized, _ = candidate.quantize_weight(original, statistics if candidate.needs_calibration else None, fqn)
        weight = quantized.dequantize().float()
        if self.question.method == "fisher":
            return second_order(weight - original, *self.question.factors_of(fqn, original.device))
        return self._divergence(index, linear, nn.Parameter(weight, requires_grad=False))

    def _reference(self) -> list[Tensor]:
        """Return the original model's final hidden states of the held-out windows."""
        if self.held_out is None:
            return []
        return [run_from(self.stages, 0, batch, self.context) for batch in self.held_out.batches]

    def _divergence(self, index: int, linear: nn.Linear, weight: nn.Parameter) -> float:
        """Return the mean KL from the original model, over the held-out tokens, with one weight changed."""
        assert self.held_out is not None
        head = self.stages[-1]
        total, count = 0.0, 0
        for batch, reference in zip(self.held_out.batches, self.reference, strict=True):
            was = head.forward(head.module, reference, None).log_softmax(-1)
            with changed(linear, weight):
                h = reference if head is self.stages[index] else run_from(self.stages, index, batch, self.context)
                now = head.forward(head.module, h, None).log_softmax(-1)
            total += float((was.exp() * (was - now)).sum(dtype=torch.float64))
            count += was.shape[0] * was.shape[1]
        return max(total / count, 0.0)  # what rounding leaves of no divergence at all may lie just below zero


def second_order(error: Tensor, input_factor: Tensor, output_factor: Tensor) -> float:
    """Return tr(H_O E H_I E^T) / 2: nats per token, to second order.

    Args:
        error: E = W_hat - W, [N, K].
        input_factor: H_I [K, K].
        output_factor: H_O [N, N].
    """
    return 0.5 * float(((output_factor @ error) * (error @ input_factor)).sum(dtype=torch.float64))
