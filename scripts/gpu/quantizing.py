"""Does a GPU quantize as the CPU does? Quantize on both, and compare what was written by the tolerances that are stated.

docs/resume-and-ranks.md says where they come from: sums in another order, of which rounding makes other codes here and there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.algorithms.products import LEAST_INNER
from llmq.api.calibrating import CalibrationSource
from llmq.api.loading import Setup
from llmq.api.planning import plan_quantization
from llmq.api.quantizing import Running, quantize_checkpoint
from llmq.api.recipes import Recipe
from llmq.checkpoint import load_model, open_checkpoint
from llmq.numerics.grid import IntGrid
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.registry import resolve

FIRST_BLOCK, LATER_BLOCKS = 0.001, 0.15
"""Largest share of codes that may differ: in every linear of the first block, and on average over all linears.

Both are for linears whose products stay in fp32 wherever they are computed, those of fewer than `LEAST_INNER` inputs.
"""
LOSS, NOISE_DB = 0.05, 0.5
"""Largest relative difference of a linear's loss, and largest difference of its signal to noise ratio."""
MEMORY = 1.25
"""Largest peak of a GPU's memory over the predicted one: its allocator rounds up."""


@dataclass(frozen=True)
class Comparison:
    """How far two artefacts of one job are apart.

    Attributes:
        codes: share of codes that differ, by linear that both multiply in fp32; none of learned or folded blocks.
        losses: relative difference of the losses that reports know, by linear; none of blocks that were learned as a whole.
        noise: difference of the signal to noise ratios in dB, by linear.
        memory: peak of the GPU's memory over the predicted one; None: not measured.
    """

    codes: Mapping[str, float]
    losses: Mapping[str, float]
    noise: Mapping[str, float]
    memory: float | None = None

    def broken(self) -> list[str]:
        """Return what is beyond a tolerance, a sentence each."""
        first = {fqn: share for fqn, share in self.codes.items() if ".layers.0." in fqn}
        told = [f"{share:.2%} of the codes of {fqn} differ" for fqn, share in first.items() if share > FIRST_BLOCK]
        mean = sum(self.codes.values()) / max(1, len(self.codes))
        if mean > LATER_BLOCKS:
            told.append(f"{mean:.2%} of all codes differ")
        told += [f"the loss of {fqn} differs by {share:.2%}" for fqn, share in self.losses.items() if share > LOSS]
        told += [f"the noise of {fqn} differs by {db:.2f} dB" for fqn, db in self.noise.items() if db > NOISE_DB]
        if self.memory is not None and self.memory > MEMORY:
            told.append(f"the GPU's memory rose to {self.memory:.2f} of what was predicted")
        return told


def compare(cpu: Path, gpu: Path, memory: float | None = None) -> Comparison:
    """Compare two artefacts of the same model and scheme."""
    mine, its = (_codes(path) for path in (cpu, gpu))
    reports = [{layer["fqn"]: layer for layer in _layers(path)} for path in (cpu, gpu)]
    alike = [fqn for fqn, codes in mine.items() if codes.shape[1] < LEAST_INNER and not reports[0][fqn]["tuned"]]
    if _folds(cpu):
        alike = []  # scales are quotients of 16-bit numbers: where one is another number, a whole column has other codes
    codes = {fqn: float((mine[fqn] != its[fqn]).double().mean()) for fqn in alike}
    losses, noise = {}, {}
    for fqn, layer in reports[0].items():
        other = reports[1][fqn]
        if layer["loss"] and other["loss"] is not None:
            losses[fqn] = abs(other["loss"] / layer["loss"] - 1)
        if layer["sqnr_db"] is not None and other["sqnr_db"] is not None:
            noise[fqn] = abs(other["sqnr_db"] - layer["sqnr_db"])
    return Comparison(codes, losses, noise, memory)


def quantize_both(
    model: Path, scheme: str, options: Mapping[str, Any], source: CalibrationSource, folder: Path, *, device: str = "cuda"
) -> Comparison:
    """Quantize a checkpoint on the CPU and on a device, into `folder`, and compare the two.

    Raises:
        LlmqError: what quantizing raises.
    """
    recipe, peak = Recipe(scheme, options, calibration=source), None
    for name in ("cpu", device):
        if name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        quantize_checkpoint(str(model), recipe, Setup(device=name), folder / name, how=Running(force=True))
    if device == "cuda":
        predicted = plan_quantization(str(model), recipe, Setup(device=device)).device_parts
        assert predicted is not None
        peak = torch.cuda.max_memory_allocated() / sum(predicted.values())
    return compare(folder / "cpu", folder / device, peak)


def _codes(path: Path) -> dict[str, Tensor]:
    """Return the codes of every quantized linear, by its name."""
    found = {}
    for name, parameter in load_model(open_checkpoint(path)).named_parameters():
        if isinstance(parameter, QuantizedTensor) and parameter.format.quantized:
            weight = parameter.weight
            codes = weight.codes() if isinstance(weight.grid, IntGrid) else weight.qdata.view(torch.uint8)
            found[name.removesuffix(".weight")] = codes
    return found


def _folds(path: Path) -> bool:
    """Whether the scheme changes a block's float weights before it chooses codes."""
    manifest = open_checkpoint(path).manifest
    assert manifest is not None
    return resolve(manifest.scheme, manifest.options).prepares


def _layers(path: Path) -> list[dict[str, Any]]:
    manifest = open_checkpoint(path).manifest
    assert manifest is not None
    return manifest.layers
