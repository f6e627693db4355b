"""Distillation: a quantized model's scales, floating zero points and norms are trained against the original's predictions.

Codes stay as they are. A share of the calibration windows is held out: the step at which they diverge least is kept, measured
with the numbers that are stored, and where no step is better than the start, the start is kept. The original's logits are never
stored: its hidden states after the last block are, and its head makes the logits again, a few rows at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.algorithms.distillation import divergence
from llmq.calibration.activations import Spill, activation_dtype
from llmq.calibration.backward import Boundaries, FloatHead, open_head
from llmq.calibration.stages import BlockModel, InMemory, Keeper, block_model, stages_of
from llmq.calibration.student import Loss, Student
from llmq.errors import SchemeError, TextError, UsageError
from llmq.numerics.weight import QuantizedWeight
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises; then it falls to 0 in a straight line."""


@dataclass(frozen=True)
class DistillSettings:
    """How a quantized model is distilled.

    Attributes:
        epochs: how often the training windows are seen.
        batch: windows a step.
        rate: largest learning rate of the relative changes of scales and norms (Adam moves each number by about this much a
            step), see `algorithms.distillation`.
        zero_rate: the same of zero points, in steps of the grid.
        norms: train the weights of norms too.
        temperature: of both distributions in the loss that is trained on; what is held out is measured at 1.
        held_out: share of the windows that is not trained on; at least one window.
        evaluations: how often the held-out windows are looked at.
        seed: of the order of the windows.
        hold: keep all blocks' graphs in memory, see `Student`.
        activations: dtype of the original model's hidden states after the last block, 'bf16' or 'fp32'.
        spill: where they lie.
        ranks: the processes that share the windows.
    """

    epochs: int = 4
    batch: int = 8
    rate: float = 4e-3
    zero_rate: float = 1e-2
    norms: bool = True
    temperature: float = 1.0
    held_out: float = 0.125
    evaluations: int = 8
    seed: int = 0
    hold: bool = False
    activations: str = "fp32"
    spill: Spill = None
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "evaluations"):
            if getattr(self, name) < 1:
                raise UsageError(f"distillation's {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("rate", "zero_rate", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"distillation's {name} must be positive, got {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"distillation holds out a share of the windows between 0 and 1, got {self.held_out}.")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One look at the held-out windows.

    Attributes:
        step: training steps before it.
        trained_kl: mean loss of the steps since the look before, nats per token; None at the start.
        held_out_kl: KL to the original over the held-out windows, nats per token.
    """

    step: int
    trained_kl: float | None
    held_out_kl: float


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What distillation did.

    Attributes:
        evaluations: of the held-out windows; the first one is of the start.
        best: which of them was kept; 0 is the start.
        steps: training steps.
        windows: windows trained on.
        held_out: windows held out.
        seconds: wall time. Not part of `to_json`: the same run writes the same bytes.
    """

    evaluations: tuple[Evaluation, ...]
    best: int
    steps: int
    windows: int
    held_out: int
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}


@dataclass(frozen=True)
class Distilled:
    """The best step.

    Attributes:
        weights: of every trained linear, by its fully qualified name; the codes are those of the start.
        norms: weights of norms in their dtypes, by the names of their parameters.
        report: how it went.
    """

    weights: dict[str, QuantizedWeight]
    norms: dict[str, Tensor]
    report: DistillReport


class Original:
    """The original model's predictions for all windows of this process: its last hidden states, and its head."""

    def __init__(
        self,
        model: BlockModel,
        keeper: Keeper,
        windows: Tensor,
        settings: DistillSettings,
        go: Callable[[int], None] = lambda _: None,
    ) -> None:
        stages = [stage for stage in stages_of(model, []) if not stage.is_head]
        boundaries = Boundaries(model, stages, keeper, every=None, spill=settings.spill)
        with torch.no_grad():
            self._states = boundaries.fill(windows, activation_dtype(settings.activations), go)
        self._head: FloatHead = open_head(model, keeper)

    def loss(self, which: Tensor, temperature: float) -> Loss:
        """Return the summed divergence from it, for the windows with these indices [B]."""
        rows = self._states.windows(which).flatten(0, 1)

        def of(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                expected = self._head(rows[part].float())
            return divergence(logits, expected, temperature)

        return of


def distill(
    model: nn.Module,
    original: nn.Module,
    tokens: Tensor,
    *,
    settings: DistillSettings | None = None,
    keeper: Keeper | None = None,
    original_keeper: Keeper | None = None,
    progress: Progress = SILENT,
) -> Distilled:
    """Train the scales, floating zero points and norms of a quantized model; the model itself is not changed.

    Args:
        model: the quantized model, a `BlockModel` whose quantized linears have `QuantizedTensor` weights.
        original: the model it was made of; may be the same object when a keeper brings the parameters.
        tokens: calibration windows of all processes, integers [n, T], at least two.
        settings: see `DistillSettings`.
        keeper: brings the quantized parameters (`restore`); None: they are in `model`.
        original_keeper: brings the original ones (`open`); None: they are in `original`.
        progress: hears of each window that went through the model, and when the start was kept.

    Returns:
        What to put into the model.

    Raises:
        SchemeError: nothing can be trained, or the loss is not finite.
        TextError: there are too few windows.
        UsageError: a model is no `BlockModel`.
    """
    started = time.perf_counter()
    settings = settings or DistillSettings()
    held_out = max(1, round(len(tokens) * settings.held_out))
    if held_out >= len(tokens):
        raise TextError(f"distillation holds out {held_out} of {len(tokens)} calibration windows; record more windows.")
    student = Student(block_model(model), keeper or InMemory(), norms=settings.norms, hold=settings.hold)
    if not student.masters():
        raise SchemeError("the model has no quantized linear with scales, and no norm, so there is nothing to distill.")
    trainer = _Trainer(student, tokens, held_out, settings)
    with torch.no_grad(), progress.task("distillation", trainer.total()) as go:
        teacher = Original(block_model(original), original_keeper or InMemory(), trainer.windows, settings, go)
        report = trainer.run(teacher, go)
        if report.best == 0:
            progress.note("distillation found nothing better on the held-out windows, so the model stays as it was")
        weights = dict(student.weights())
    return Distilled(weights, student.norms(), replace(report, seconds=time.perf_counter() - started))


class _Trainer:
    """The loop over steps; `windows` are those of this process, `_mine` their indices among all."""

    def __init__(self, student: Student, tokens: Tensor, held_out: int, settings: DistillSettings) -> None:
        self._student, self._settings, self._ranks = student, settings, settings.ranks
        self._count, self._held_out, self._length = len(tokens) - held_out, held_out, tokens.shape[1]
        share = self._ranks.share(len(tokens))
        self._mine = torch.arange(share.start, share.stop)
        self.windows = tokens[share.start : share.stop]
        per_epoch = -(-self._count // settings.batch)
        self._steps = settings.epochs * per_epoch
        scales, zeros, norms = student.groups()
        rates = ((scales, settings.rate), (zeros, settings.zero_rate), (norms, settings.rate))
        groups = [{"params": tensors, "lr": rate, "top": rate} for tensors, rate in rates if tensors]
        # gradients are of nats per token by relative changes, some 1e-5: the usual eps would swallow them
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)

    def total(self) -> int:
        """Return how many windows will be heard of."""
        looks = 1 + self._settings.evaluations
        seen = self._settings.epochs * self._count + looks * self._held_out
        return len(self.windows) * len(self._student) + seen

    def run(self, teacher: Original, go: Callable[[int], None]) -> DistillReport:
        """Train, and leave the student at its best step."""
        looks = {round((number + 1) * self._steps / self._settings.evaluations) for number in range(self._settings.evaluations)}
        found = [Evaluation(0, None, self._held_out_kl(teacher, go))]
        best, kept = 0, [tensor.clone() for tensor in self._student.masters()]
        recent: list[float] = []
        generator = torch.Generator().manual_seed(self._settings.seed)
        order: list[Tensor] = []
        for step in range(self._steps):
            order = order or list(torch.split(torch.randperm(self._count, generator=generator), self._settings.batch))
            recent.append(self._step(teacher, step, order.pop(0), go))
            if step + 1 in looks:
                found.append(Evaluation(step + 1, sum(recent) / len(recent), self._held_out_kl(teacher, go)))
                recent = []
                if found[-1].held_out_kl < found[best].held_out_kl:
                    best, kept = len(found) - 1, [tensor.clone() for tensor in self._student.masters()]
        for tensor, value in zip(self._student.masters(), kept, strict=True):
            tensor.copy_(value)
        return DistillReport(tuple(found), best, self._steps, self._count, self._held_out)

    def _step(self, teacher: Original, step: int, batch: Tensor, go: Callable[[int], None]) -> float:
        """Make one step with the windows `batch` (indices among all); return the mean loss a token."""
        self._adam.zero_grad(set_to_none=True)
        own = self._sum(teacher, batch, self._student.backward, self._settings.temperature, go)
        tokens = len(batch) * self._length
        for tensor in self._student.masters():
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            tensor.grad = self._ranks.sum_(gradient).div_(tokens)
        loss = self._ranks.sum_(torch.tensor(own, dtype=torch.float64)).item() / tokens
        if not loss < float("inf"):
            raise SchemeError(f"the loss of distillation is not finite at step {step + 1} of {self._steps}; lower its rate.")
        factor = min((step + 1) / (WARM_UP * self._steps + 1), 1.0) * (1 - step / self._steps)
        for group in self._adam.param_groups:
            group["lr"] = group["top"] * factor
        self._adam.step()
        return loss

    def _held_out_kl(self, teacher: Original, go: Callable[[int], None]) -> float:
        held = torch.arange(self._count, self._count + self._held_out)
        total = torch.tensor(self._sum(teacher, held, self._student.evaluate, 1.0, go), dtype=torch.float64)
        return self._ranks.sum_(total).item() / (self._held_out * self._length)

    def _sum(
        self,
        teacher: Original,
        batch: Tensor,
        run: Callable[[Tensor, Loss], float],
        temperature: float,
        go: Callable[[int], None],
    ) -> float:
        """Run those windows of a batch that are of this process; return the summed loss."""
        own = batch[torch.isin(batch, self._mine)] - (int(self._mine[0]) if len(self._mine) else 0)
        total = 0.0
        for part in self._student.batches(len(own), self._length):
            which = own[part]
            total += run(self.windows[which], teacher.loss(which, temperature))
            go(len(which))
        return total
