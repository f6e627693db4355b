"""Distillation as the last phase: of a model in memory, or of a job's finished parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmq.api.keeping import JobKeeper, Lent
from llmq.calibration.activations import Spill
from llmq.calibration.distill import Distilled, DistillSettings, distill
from llmq.calibration.stages import InMemory, Keeper
from llmq.checkpoint.load import assign
from llmq.checkpoint.parts import PartwiseModel
from llmq.checkpoint.store import stored_parameter
from llmq.ops.tensor import QuantizedTensor
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks
from llmq.schemes.apply import quantized_parameter
from llmq.schemes.cover import Decision

HELD_BYTES = 1 << 29
"""Models up to this size in fp32 keep all blocks' graphs between going forwards and backwards."""
STAGE = "distilled"
"""What is added to a part's name when it is stored for the second time."""


def distill_settings(
    decisions: Sequence[Decision], *, seed: int, spill: Spill = None, ranks: Ranks | None = None
) -> DistillSettings | None:
    """Return how a model is distilled: as the first scheme that asks for it says; None where none does."""
    for decision in decisions:
        how = decision.scheme.distillation if decision.scheme is not None else None
        if how is not None:
            graphs = sum(decision.parameter.numel() for decision in decisions) * torch.float32.itemsize
            hold = graphs < HELD_BYTES  # the same bits, in less time
            return DistillSettings(**how, seed=seed, spill=spill, hold=hold, ranks=ranks or Ranks())
    return None


def distill_model(
    model: nn.Module, original: nn.Module, tokens: torch.Tensor, settings: DistillSettings, *, progress: Progress = SILENT
) -> dict[str, Any]:
    """Distill a quantized model in memory, in place; return the report as plain data."""
    found = distill(model, original, tokens, settings=settings, progress=progress)
    _put(model, found)
    return found.report.to_json()


def distill_job(
    keeper: JobKeeper, tokens: torch.Tensor, settings: DistillSettings, *, progress: Progress = SILENT
) -> dict[str, Any]:
    """Distill the finished parts of a job, and store them again under their second names, unless they are there already.

    Args:
        keeper: of the job; every part is finished.
        tokens: calibration windows of all processes, [n, T].
        settings: see `DistillSettings`.
        progress: see `distill`.

    Returns:
        The report as plain data.
    """
    parts = keeper.parts
    known = [keeper.entry(second_name(part)) for part in parts.parts]
    if all(entry is not None for entry in known):
        assert known[0] is not None
        report: dict[str, Any] = known[0]["distillation"]
        return report
    student = PartwiseModel(parts.checkpoint, parts.model.dtype)
    resident = JobKeeper(student, keeper.job, ranks=keeper.ranks, strict=False)
    for part in student.parts:
        resident.restore(part)  # mapped from the job's files: their pages leave memory when others need it
    own: Keeper = InMemory() if parts.device == student.device else Lent(student, parts.device)
    found = distill(student.model, parts.model, tokens, settings=settings, keeper=own, original_keeper=keeper, progress=progress)
    _put(student.model, found)
    for part in student.parts:
        entry = keeper.entry(part)
        assert entry is not None
        facts = {key: value for key, value in entry.items() if key not in ("sha256", "nbytes")}
        with keeper.ranks.together():
            if keeper.job is not None:
                tensors: dict[str, torch.Tensor] = {}
                parameters = dict(student.model.named_parameters(remove_duplicate=False))
                for name in resident.names(part):
                    tensors |= stored_parameter(name, parameters[name], student.model.dtype)[0]
                keeper.job.store(second_name(part), tensors, {**facts, "distillation": found.report.to_json()})
    return found.report.to_json()


def second_name(part: str) -> str:
    """Return the name under which a part is stored once it is distilled."""
    return f"{part}.{STAGE}"


def _put(model: nn.Module, found: Distilled) -> None:
    """Put trained scales, zero points and norms into a model."""
    for fqn, weight in found.weights.items():
        linear = model.get_submodule(fqn)
        assert isinstance(linear.weight, QuantizedTensor)
        here = weight.to(linear.weight.device)
        linear.weight = quantized_parameter(here, linear.weight.format, linear.weight.dtype)
    for name, value in found.norms.items():
        assign(model, name, value.to(model.get_parameter(name).device))
