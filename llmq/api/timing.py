"""How long a quantization will take: its phases run on the first block, and on none, and the rest is arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from llmq.api.calibrating import calibration_set, check_overlap
from llmq.api.keeping import JobKeeper
from llmq.api.loading import Loaded, Setup
from llmq.api.phases import run_phases
from llmq.api.recipes import Recipe, settle
from llmq.calibration.activations import Spill
from llmq.checkpoint import Checkpoint
from llmq.checkpoint.job import Job
from llmq.checkpoint.parts import PartwiseModel
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Timing:
    """Predicted wall time, in seconds.

    Attributes:
        start: recording calibration windows, hashing the model, and what does not depend on the number of blocks.
        block: one block, through every phase.
        blocks: how many there are.
    """

    start: float
    block: float
    blocks: int

    @property
    def total(self) -> float:
        """Of the whole job."""
        return self.start + self.block * self.blocks


def measure_time(
    checkpoint: Checkpoint,
    recipe: Recipe,
    setup: Setup,
    *,
    activations: str = "bf16",
    spill: Spill = None,
    progress: Progress = SILENT,
) -> Timing:
    """Quantize the model's first block in a temporary folder, with all calibration windows, and extrapolate.

    Args:
        checkpoint: the original.
        recipe: as `quantize_checkpoint` takes it.
        setup: likewise.
        activations: see `WalkSettings`.
        spill: see `WalkSettings`.
        progress: told of the phases.
    """
    setup.apply()
    started = time.perf_counter()
    loaded = Loaded(checkpoint, PartwiseModel(checkpoint, setup.torch_dtype).model, None, setup)
    settled = settle(recipe, loaded.model, setup.torch_dtype)
    if settled.needs_calibration:
        source, config = recipe.calibration, checkpoint.config
        loaded.calibration = calibration_set(loaded.tokenizer, config, source, seed=setup.seed, progress=progress)
        check_overlap(loaded.calibration, loaded.tokenizer, eval_text=source.eval_text)
    checkpoint.sha256  # noqa: B018 - a job reads the whole model once to know that it is the same
    start = time.perf_counter() - started
    seconds = []
    with TemporaryDirectory() as folder:
        for blocks in (0, 1):
            parts = PartwiseModel(checkpoint, setup.torch_dtype, setup.device)
            settled = settle(recipe, parts.model, setup.torch_dtype)
            del parts.model.model.layers[blocks:]
            there = {id(module) for module in parts.model.modules() if isinstance(module, nn.Linear)}
            kept = [each for each in settled.decisions if each.linear is None or id(each.linear) in there]
            loaded.model = parts.model
            job = Job(Path(folder) / str(blocks), {}, force=False)
            keeper = JobKeeper(parts, job, ranks=Ranks(), strict=False)
            started = time.perf_counter()
            few = replace(settled, decisions=kept)
            run_phases(few, loaded, keeper, activations=activations, spill=spill, progress=progress)
            seconds.append(time.perf_counter() - started)
    return Timing(start + seconds[0], max(0.0, seconds[1] - seconds[0]), checkpoint.config.num_layers)
