"""The keepers of models that are quantized from disk to disk: one part in memory, or on a device, at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.algorithms.report import LayerReport
from llmq.checkpoint.artefact import assemble, stored_names
from llmq.checkpoint.job import Job
from llmq.checkpoint.load import assign
from llmq.checkpoint.parts import PartwiseModel
from llmq.checkpoint.source import EMBEDDING as EMBEDDING_WEIGHT
from llmq.checkpoint.source import HEAD as HEAD_WEIGHT
from llmq.checkpoint.store import stored_parameter
from llmq.errors import SchemeError
from llmq.numerics.grid import LinearFormat, format_from_json
from llmq.ops.tensor import QuantizedTensor
from llmq.ranks import Ranks
from llmq.schemes.block import EMBEDDING, HEAD


class JobKeeper:
    """Opens parts of an original checkpoint, and keeps what becomes of them in a job's folder.

    Attributes:
        parts: the model.
        job: the folder; only the first process writes there.
        ranks: the processes.
        strict: a fallback in a report is an error, before the part is stored.
    """

    def __init__(self, parts: PartwiseModel, job: Job | None, *, ranks: Ranks, strict: bool) -> None:
        self.parts, self.job, self.ranks, self.strict = parts, job, ranks, strict

    def open(self, part: str) -> None:
        """See `Keeper.open`."""
        self.parts.open(part)

    def leave(self, part: str) -> None:
        """See `Keeper.leave`."""
        self.parts.drop(part)

    def close(self, part: str, reports: list[LayerReport]) -> None:
        """See `Keeper.close`.

        Raises:
            SchemeError: a report has a fallback, and the run is strict.
            OutputError: the part cannot be written.
        """
        fallbacks = [f"{report.fqn}: {report.fallback}" for report in reports if report.fallback]
        if fallbacks and self.strict:
            raise SchemeError(
                f"--strict: {fallbacks[0]}; what was finished before is kept: without --strict the same command goes on with "
                "round to nearest there."
            )
        with self.ranks.together():
            if self.job is not None:
                tensors, formats = self._stored(part)
                facts = {
                    "formats": formats,
                    "reports": [report.to_json() for report in reports],
                    "seconds": [report.seconds for report in reports],
                }
                self.job.store(part, tensors, facts)
        self.parts.drop(part)

    def finished(self, part: str) -> list[LayerReport] | None:
        """See `Keeper.finished`."""
        entry = self.entry(part)
        if entry is None:
            return None
        pairs = zip(entry["reports"], entry["seconds"], strict=True)
        return [LayerReport.from_json(data, seconds=seconds) for data, seconds in pairs]

    def restore(self, part: str) -> None:
        """See `Keeper.restore`."""
        entry = self.entry(part)
        assert entry is not None
        tensors = self._broadcast(part)
        dtype = self.parts.model.dtype
        forms = {f"{fqn}.weight": format_from_json(data) for fqn, data in entry["formats"].items()}
        names = list(self.parts.parts[part])
        if HEAD_WEIGHT in forms and HEAD_WEIGHT not in names and forms[HEAD_WEIGHT].quantized:
            names.append(HEAD_WEIGHT)  # of a tied model: quantized, it is no longer the embedding
        for name in names:
            form = forms.get(name)
            self.parts.put(name, _value(name, form, tensors, tuple(self.parts.shape(name)), dtype))
        if part == HEAD and HEAD_WEIGHT not in names:  # tied, and still the embedding
            self.parts.put(HEAD_WEIGHT, self._broadcast(EMBEDDING)[EMBEDDING_WEIGHT])

    def entry(self, part: str) -> dict[str, Any] | None:
        """Return what the first process knows of a finished part; see `Job.entry`."""
        mine = None
        with self.ranks.together():
            if self.job is not None:
                mine = self.job.entry(part)
        known: dict[str, Any] | None = self.ranks.json_from(mine, 0)
        return known

    def names(self, part: str) -> list[str]:
        """Names of the parameters that are stored for a part: a tied head only where it is its own now."""
        names = list(self.parts.parts[part])
        head = self.parts.model.lm_head.weight
        own = isinstance(head, QuantizedTensor) and head.format.quantized
        if part == HEAD and self.parts.checkpoint.config.tie_word_embeddings and own:
            names.append(HEAD_WEIGHT)
        return names

    def _stored(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        model = self.parts.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors: dict[str, Tensor] = {}
        formats: dict[str, Any] = {}
        for name in self.names(part):
            own, form = stored_parameter(name, parameters[name], model.dtype)
            tensors |= {stored: tensor.cpu() for stored, tensor in own.items()}
            if form is not None:
                formats[name.removesuffix(".weight")] = form
        if part == HEAD and HEAD_WEIGHT.removesuffix(".weight") not in formats:
            form = stored_parameter(HEAD_WEIGHT, parameters[HEAD_WEIGHT], model.dtype)[1]
            if form is not None:
                formats[HEAD_WEIGHT.removesuffix(".weight")] = form
        return tensors, formats

    def _broadcast(self, part: str) -> dict[str, Tensor]:
        """Return the stored tensors of a part, which the first process reads for all."""
        mine = self.job.tensors(part) if self.job is not None else {}
        if self.ranks.size == 1:
            return mine
        shapes = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in mine.items()}
        described = self.ranks.json_from(shapes, 0)
        tensors = {}
        for name, (shape, dtype) in described.items():
            tensor = mine[name].clone() if name in mine else torch.empty(shape, dtype=getattr(torch, dtype))
            self.ranks.tensor_from(tensor.view(-1).view(torch.uint8), 0)
            tensors[name] = tensor
        return tensors


class Lent:
    """The keeper of a model that stays in the host's memory: a part is on a device as long as somebody works with it."""

    def __init__(self, parts: PartwiseModel, device: torch.device) -> None:
        """Lend the parts of a model that are all open, and on the CPU, to a device."""
        self._parts, self._device = parts, device
        self._held: dict[str, nn.Parameter] = {}

    def open(self, part: str) -> None:
        """See `Keeper.open`."""
        for name in dict.fromkeys((*self._parts.parts[part], *([HEAD_WEIGHT] if part == HEAD else []))):
            self._held[name] = self._parts.model.get_parameter(name)
            assign(self._parts.model, name, self._held[name].detach().to(self._device))

    def restore(self, part: str) -> None:
        """See `Keeper.restore`: there is one state of it."""
        self.open(part)

    def leave(self, part: str) -> None:  # noqa: ARG002 - one is lent at a time
        """See `Keeper.leave`."""
        for name, parameter in self._held.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self._parts.model.get_submodule(owner), leaf, parameter)
        self._held = {}

    def close(self, part: str, reports: list[LayerReport]) -> None:
        """See `Keeper.close`."""

    def finished(self, part: str) -> list[LayerReport] | None:  # noqa: ARG002
        """See `Keeper.finished`."""
        return None


def _value(
    name: str, form: LinearFormat | None, tensors: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Make a parameter of what is stored for it."""
    if form is None or not form.quantized:
        return tensors[name]
    own = {stored: tensors[stored] for stored in stored_names(name, form)}
    return QuantizedTensor.from_weight(assemble(name, form, shape, own), form, dtype)
