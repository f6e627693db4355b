"""Fisher factors between the pass that estimates them and the walk that uses them: in memory, or a file a linear."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from llmq.algorithms.statistics import Needs
from llmq.calibration.fisher import FisherSettings, fisher_factors
from llmq.calibration.recorder import CalibrationSet
from llmq.calibration.stages import Keeper
from llmq.errors import OutputError
from llmq.progress import SILENT, Progress
from llmq.schemes.cover import Decision


class Factors(Protocol):
    """Where the Fisher factors of linears are."""

    @property
    def complete(self) -> bool:
        """Whether all of them are there."""
        ...

    def write(self, fqn: str, inputs: Tensor, outputs: Tensor) -> None:
        """Keep H_I [K, K] and H_O [N, N] of a linear."""
        ...

    def read(self, fqn: str) -> tuple[Tensor, Tensor]:
        """Return H_I and H_O of a linear, on the CPU."""
        ...

    def finish(self) -> None:
        """Take note that all of them are there."""
        ...


class FactorMemory:
    """Factors in the host's memory, for models whose factors fit there."""

    def __init__(self) -> None:
        self.complete = False
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def write(self, fqn: str, inputs: Tensor, outputs: Tensor) -> None:
        """See `Factors.write`."""
        self._held[fqn] = (inputs.cpu(), outputs.cpu())

    def read(self, fqn: str) -> tuple[Tensor, Tensor]:
        """See `Factors.read`."""
        return self._held[fqn]

    def finish(self) -> None:
        """See `Factors.finish`."""
        self.complete = True


class FactorFiles:
    """Factors in a folder, a safetensors file a linear: their sum over a model is larger than the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = folder / "complete"

    @property
    def complete(self) -> bool:
        """See `Factors.complete`."""
        return self._mark.is_file()

    def write(self, fqn: str, inputs: Tensor, outputs: Tensor) -> None:
        """See `Factors.write`; OutputError where the disk is full."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        file = self._file(fqn)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"inputs": inputs.cpu().contiguous(), "outputs": outputs.cpu().contiguous()}, file)
            with file.open("rb") as written:
                os.fsync(written.fileno())  # `complete` must not outlast a loss of power that they do not
        except (OSError, SafetensorError) as error:  # the writer has an error of its own for a full disk
            file.unlink(missing_ok=True)
            raise OutputError(
                f"cannot write the Fisher factors of {fqn} to {self.folder}: {str(error).splitlines()[0]}; free some space and "
                "run the same again."
            ) from error

    def read(self, fqn: str) -> tuple[Tensor, Tensor]:
        """See `Factors.read`."""
        from safetensors.torch import load_file

        held = load_file(self._file(fqn))
        return held["inputs"], held["outputs"]

    def finish(self) -> None:
        """See `Factors.finish`."""
        self._mark.touch()

    def _file(self, fqn: str) -> Path:
        return self.folder / f"{fqn}.safetensors"


def gather_factors(
    model: nn.Module,
    decisions: Sequence[Decision],
    calibration: CalibrationSet,
    factors: Factors,
    *,
    keeper: Keeper,
    settings: FisherSettings,
    progress: Progress = SILENT,
) -> bool:
    """Estimate the factors that the schemes of these decisions need, unless they are there already.

    Args:
        model: with its original weights, see `fisher_factors`.
        decisions: what is to become of every linear.
        calibration: token windows.
        factors: where they go.
        keeper: who has the model's parameters.
        settings: how; the rounds are the schemes' own, and only on a disk all hidden states are kept.
        progress: see `fisher_factors`.

    Returns:
        Whether any linear needs factors.
    """
    needy = [decision for decision in decisions if decision.scheme is not None and Needs.FISHER in decision.scheme.needs]
    if not needy:
        return False
    all_there = all(settings.ranks.gather_json(factors.complete))
    if not all_there:
        blocks = len(model.blocks) if isinstance(model.blocks, nn.ModuleList) else 1
        own = replace(
            settings,
            rounds=max(decision.scheme.fisher_rounds for decision in needy if decision.scheme is not None),
            every=1 if isinstance(settings.spill, Path) else max(1, isqrt(blocks)),
        )
        fqns = [decision.fqn for decision in needy]
        fisher_factors(model, calibration.tokens, fqns, factors.write, settings=own, keeper=keeper, progress=progress)
        factors.finish()
    return True
