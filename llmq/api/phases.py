"""What a quantization goes through, one phase after another: Fisher factors of the original model, the walk, distillation."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from llmq.algorithms.report import LayerReport
from llmq.api.distilling import distill_job, distill_settings
from llmq.api.keeping import JobKeeper
from llmq.api.loading import Loaded
from llmq.api.recipes import Settled
from llmq.calibration.activations import Spill
from llmq.calibration.factors import FactorFiles, gather_factors
from llmq.calibration.fisher import FisherSettings
from llmq.calibration.sequential import Walk, WalkSettings
from llmq.files import trim_heap
from llmq.progress import Progress
from llmq.ranks import Ranks


def run_phases(
    settled: Settled, loaded: Loaded, keeper: JobKeeper, *, activations: str, spill: Spill, progress: Progress
) -> list[LayerReport]:
    """Run every phase that the schemes ask for and that no earlier run has finished.

    Args:
        settled: what is to become of every parameter.
        loaded: the model, whose parameters the keeper opens, and the calibration windows.
        keeper: who has the parameters, and the job's folder.
        activations: see `WalkSettings`.
        spill: see `WalkSettings`.
        progress: told of each phase.

    Returns:
        A report for each quantized linear.
    """
    ranks: Ranks = keeper.ranks
    trim_heap()  # a text that was cut into windows leaves much behind
    with TemporaryDirectory() as scratch:
        # every process has factors of its own: they may be on different machines
        factors = FactorFiles(keeper.job.folder / "factors" if keeper.job is not None else Path(scratch))
        settings = WalkSettings(activations, spill, factors, ranks)
        if loaded.calibration is not None:
            fisher = FisherSettings(seed=loaded.setup.seed, activations=activations, spill=spill, ranks=ranks)
            windows = loaded.calibration
            gather_factors(loaded.model, settled.decisions, windows, factors, keeper=keeper, settings=fisher, progress=progress)
        with ranks.together():
            walk = Walk(loaded.model, settled.decisions, loaded.calibration, keeper=keeper, settings=settings)
        reports = walk.run(progress=progress)
    how = distill_settings(settled.decisions, seed=loaded.setup.seed, spill=spill, ranks=ranks)
    if how is not None and loaded.calibration is not None:
        loaded.distillation = distill_job(keeper, loaded.calibration.tokens, how, progress=progress)
    return reports
