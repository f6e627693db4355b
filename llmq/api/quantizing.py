"""Writing quantized checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmq import __version__
from llmq.api.loading import Loaded, Recipe, Setup, apply_recipe
from llmq.checkpoint import Manifest, load_model, open_checkpoint, save_model
from llmq.errors import UsageError
from llmq.files import check_absent
from llmq.progress import SILENT, Progress
from llmq.results.record import Metric, Protocol, ResultRecord

_VERSIONED = ("torch", "safetensors")
"""Packages whose version can change the bytes that are written."""


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint on disk, and what it cost to make."""

    out: Path
    loaded: Loaded
    manifest: Manifest
    record: ResultRecord


def quantize_checkpoint(
    path: str, recipe: Recipe, setup: Setup, out: Path, *, force: bool = False, progress: Progress = SILENT
) -> Quantized:
    """Quantize the checkpoint at `path` and write it to the folder `out`, whole or not at all.

    Raises:
        OutputError: `out` exists and `force` is not set, or it cannot be written.
        InputError: the checkpoint, tokenizer or calibration text cannot be used.
        SchemeError: the scheme does not fit the model.
    """
    check_absent(out, force=force)
    setup.apply()
    checkpoint = open_checkpoint(path)
    if checkpoint.manifest is not None:
        raise UsageError(f"{path} is quantized already (scheme {checkpoint.manifest.scheme}); name the original checkpoint.")
    loaded = Loaded(checkpoint, load_model(checkpoint, dtype=setup.torch_dtype, progress=progress), None, setup)
    apply_recipe(loaded, recipe, progress=progress)
    assert loaded.coverage is not None
    environment = loaded.setup.environment()
    manifest = Manifest(
        scheme=loaded.scheme,
        options=loaded.options,
        source={"name": loaded.name, "format": checkpoint.format, "sha256": checkpoint.sha256},
        calibration=loaded.calibration.info.to_json() if loaded.calibration else None,
        tokenizer_sha256=loaded.tokenizer.sha256,
        seed=setup.seed,
        threads=torch.get_num_threads(),
        versions={"llmq": __version__} | {name: environment.packages[name] for name in _VERSIONED},
        skipped={fqn: why for fqn, why in loaded.coverage.skipped.items() if not why.startswith("not a linear")},
        layers=[report.to_json() for report in loaded.reports],
    )
    written = save_model(loaded.model, out, manifest=manifest, source=checkpoint, force=force, progress=progress)
    assert written.manifest is not None
    return Quantized(out, loaded, written.manifest, _record(loaded))


def _record(loaded: Loaded) -> ResultRecord:
    size = loaded.size
    metrics = {
        "size_bytes": Metric(value=size.bytes, unit="bytes"),
        "bits_per_weight": Metric(value=size.matrix_bits_per_weight, unit="bits"),
        "file_bits_per_weight": Metric(value=size.file_bits_per_weight, unit="bits"),
    }
    lossy = [report for report in loaded.reports if report.loss is not None and report.rtn_loss]
    if lossy:
        ratios = sorted(report.loss / report.rtn_loss for report in lossy if report.loss is not None and report.rtn_loss)
        metrics["median_loss_over_rtn"] = Metric(value=ratios[len(ratios) // 2], unit="1")
    return ResultRecord(
        kind="quantize",
        subject=loaded.subject(with_cache=False),
        protocol=Protocol(name="quantize", version=1, params={"seed": loaded.setup.seed, "threads": torch.get_num_threads()}),
        metrics=metrics,
        environment=loaded.setup.environment(),
        notes=[f"{report.fqn}: {report.fallback}" for report in loaded.reports if report.fallback],
    )
