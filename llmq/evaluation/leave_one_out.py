"""What each linear of a model costs: the model with one weight changed against the model as it is, token by token.

Hidden states before each block are kept, so that a run starts at the block concerned. What comes out is what the whole model
would give, bit for bit: the same blocks see the same numbers in batches of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.calibration.partial import changed, fqn_of, linears_of, run_from
from llmq.calibration.stages import Stage, stages_of
from llmq.evaluation.divergence import CandidateResult
from llmq.evaluation.estimates import Estimate, batch_sums, ratio_estimate
from llmq.evaluation.protocols import Window
from llmq.evaluation.scoring import HasContext, LanguageModel
from llmq.model.llama import Llama
from llmq.progress import SILENT, Progress
from llmq.schemes.cover import Decision

Measure = Callable[[LanguageModel], CandidateResult]
"""Runs a model over the windows and compares it with the original."""


@dataclass(frozen=True, eq=False)
class Change:
    """By how much less a model loses with something changed, window by window; paired, so what is hard for both cancels.

    Attributes:
        kl: float64 [W], sums over each window's tokens of KL(original ‖ before) - KL(original ‖ after).
        nll: float64 [W], the same of -ln p(token).
        sizes: int32 [W], tokens of each window.
    """

    kl: Tensor
    nll: Tensor
    sizes: Tensor

    @staticmethod
    def between(before: CandidateResult, after: CandidateResult) -> Change:
        """Compare two models on the same windows."""
        sizes = before.divergence.window_sizes
        nll = before.perplexity.losses.nll.double() - after.perplexity.losses.nll.double()
        return Change(batch_sums(before.divergence.kl - after.divergence.kl, sizes), batch_sums(nll, sizes), sizes)

    def times(self, factor: float) -> Change:
        """Return a part of it."""
        return Change(self.kl * factor, self.nll * factor, self.sizes)

    def plus(self, other: Change) -> Change:
        """Return both together, as if they did not touch one another."""
        return Change(self.kl + other.kl, self.nll + other.nll, self.sizes)

    @property
    def mean_kl(self) -> Estimate:
        """Nats per token, with the standard error by batch means."""
        return ratio_estimate(self.kl, self.sizes)

    @property
    def ln_perplexity(self) -> Estimate:
        """Nats per token, with the standard error by batch means."""
        return ratio_estimate(self.nll, self.sizes)

    @property
    def certain(self) -> bool:
        """Whether the divergence falls by more than two standard errors; by anything at all, where there is no error."""
        found = self.mean_kl
        return found.value > 2 * (found.stderr or 0.0)


class Resumed:
    """A model that goes on from hidden states before one of its stages, which it keeps for every batch of windows."""

    def __init__(self, model: Llama, batches: Sequence[Sequence[Window]]) -> None:
        self._model = model
        self.stages: list[Stage] = all_stages(model)
        self._start = 0
        tokens = [torch.stack([window.inputs for window in batch]) for batch in batches]
        self._states = {_key(batch): model.embed(batch.to(model.device)) for batch in tokens}

    @property
    def config(self) -> HasContext:
        """See `LanguageModel`."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """See `LanguageModel`."""
        return self._model.device

    @property
    def states(self) -> list[Tensor]:
        """The hidden states [B, T, hidden] before the stage that is next."""
        return list(self._states.values())

    def hidden(self, tokens: Tensor) -> Tensor:
        """See `LanguageModel`; the tokens must be those of a batch."""
        h = self._states[_key(tokens)]
        return run_from(self.stages, self._start, h, self._model.context(h))

    def head(self, h: Tensor) -> Tensor:
        """See `LanguageModel`."""
        return self._model.head(h)

    def run_stage(self, h: Tensor) -> Tensor:
        """Run the next stage on hidden states of any dtype; its own is the model's."""
        stage, h = self.stages[self._start], h.to(self._model.dtype)
        return stage.forward(stage.module, h, self._model.context(h))

    def advance(self) -> None:
        """Let the states go through the next stage."""
        if not self.stages[self._start].is_head:
            self._states = {key: self.run_stage(h) for key, h in self._states.items()}
        self._start += 1


def all_stages(model: Llama) -> list[Stage]:
    """Cut a model into its blocks and the head, each with all of its linears, quantized or not."""
    linears = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    return stages_of(model, [Decision(fqn, linear, linear.weight, None) for fqn, linear in linears.items()])


def leave_one_out(
    model: Llama,
    before: CandidateResult,
    weights: Mapping[str, Callable[[], nn.Parameter]],
    measure: Measure,
    batches: Sequence[Sequence[Window]],
    *,
    progress: Progress = SILENT,
) -> dict[str, Change]:
    """Measure a model with one linear's weight in another's place, for each linear in turn.

    Args:
        model: ready to run; it is the same again afterwards.
        before: what `measure` says of it.
        weights: makes the other weight, by the linear's fully qualified name; each is let go before the next is made.
        measure: what is asked of a model.
        batches: the windows that `measure` runs, in its batches.
        progress: hears of each linear.

    Returns:
        What the model loses less with each weight changed, in the model's order.
    """
    found: dict[str, Change] = {}
    with torch.no_grad(), progress.task("one linear at a time", len(weights)) as advance:
        resumed = Resumed(model, batches)
        for stage in resumed.stages:
            for name, linear in linears_of(stage, weights).items():
                fqn = fqn_of(stage, name)
                with changed(linear, weights[fqn]()):
                    found[fqn] = Change.between(before, measure(resumed))
                advance(1)
            resumed.advance()
    return found


def _key(tokens: Tensor) -> bytes:
    return tokens.cpu().contiguous().numpy().tobytes()
