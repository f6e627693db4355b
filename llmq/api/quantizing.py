"""Writing quantized checkpoints: part by part, so that memory holds a few blocks whatever the number of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmq import __version__
from llmq.algorithms.report import LayerReport
from llmq.api.calibrating import OverlapCheck, calibration_json, calibration_set, check_overlap
from llmq.api.distilling import second_name
from llmq.api.keeping import JobKeeper
from llmq.api.loading import Loaded, Setup
from llmq.api.phases import run_phases
from llmq.api.recipes import Recipe, Settled, settle
from llmq.calibration.activations import Spill
from llmq.calibration.recorder import CalibrationSet
from llmq.checkpoint import Manifest, load_model, open_checkpoint
from llmq.checkpoint.job import Job
from llmq.checkpoint.parts import PartwiseModel
from llmq.checkpoint.rotated import RotatedModel, rotation_json, rotation_of, settle_rotation
from llmq.checkpoint.source import Checkpoint
from llmq.errors import Interrupted, TextError, UsageError
from llmq.numerics.grid import format_from_json
from llmq.numerics.weight import float_grid
from llmq.ops.features import has_bf16_dot
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks, join_ranks
from llmq.results.coverage import Coverage
from llmq.results.record import Metric, Protocol, ResultRecord
from llmq.schemes.cover import as_done, coverage

_VERSIONED = ("torch", "safetensors")
"""Packages whose version can change the bytes that are written."""


@dataclass(frozen=True, slots=True)
class Running:
    """How a quantization runs; none of it but `activations` changes what is written.

    Attributes:
        force: replace an existing output.
        restart: throw away what an earlier, unfinished run has left.
        strict: end with an error where something falls back or the calibration text overlaps the evaluation text.
        activations: dtype of hidden states between blocks, 'bf16' or 'fp32'.
        spill: where they lie, see `calibration.activations`.
    """

    force: bool = False
    restart: bool = False
    strict: bool = False
    activations: str = "bf16"
    spill: Spill = None


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint on disk, and what it cost to make."""

    out: Path
    loaded: Loaded
    manifest: Manifest
    record: ResultRecord
    resumed: int = 0
    """Parts that an earlier run had finished."""


def quantize_checkpoint(
    path: str, recipe: Recipe, setup: Setup, out: Path, *, how: Running | None = None, progress: Progress = SILENT
) -> Quantized | None:
    """Quantize the checkpoint at `path` and write it to the folder `out`, whole or not at all.

    What is finished is kept in `out`.partial: after a kill, a full disk or an interrupt the same call goes on there, and ends
    with the same bytes.

    Returns:
        The result; None in every process but the first of several.

    Raises:
        OutputError: `out` exists and may not be replaced, or it cannot be written.
        InputError: the checkpoint, tokenizer or calibration text cannot be used.
        SchemeError: the scheme does not fit the model; with `strict`, something fell back.
        UsageError: what an earlier run left belongs to another job.
    """
    how = how or Running()
    ranks = join_ranks(setup.device)
    progress = progress if ranks.first else SILENT
    with ranks.together():
        setup.apply()
        checkpoint = open_checkpoint(path)
        if checkpoint.manifest is not None:
            raise UsageError(f"{path} is quantized already (scheme {checkpoint.manifest.scheme}); name the original checkpoint.")
        baseline = recipe.resolve().baseline_dtype
        setup = setup if baseline is None else replace(setup, dtype=recipe.scheme)
        parts = _parts(checkpoint, recipe, setup)
        settled = settle(recipe, parts.model, setup.torch_dtype)
        loaded = Loaded(checkpoint, parts.model, settled.resolved, setup, overrides=recipe.overrides)
        loaded.calibration, check = _calibration(loaded, recipe, settled, how, ranks=ranks, progress=progress)
        manifest = _manifest(loaded, recipe, settled, check)
        identity = _identity(manifest, recipe, loaded.calibration, how, ranks)
    ranks.check_same(identity)
    if ranks.size > 1:
        progress.note(
            f"{ranks.size} processes, {torch.get_num_threads()} threads each: what --threads says, or a share of the cores; "
            "OMP_NUM_THREADS, which torchrun sets, changes nothing"
        )
    with ranks.together():
        job = Job(out, identity, force=how.force, restart=how.restart) if ranks.first else None
    covering = partial(_covered, recipe, settled, baseline or setup.torch_dtype)
    with _at_work(job):
        if ranks.json_from(job is not None and job.placed, 0):
            written, resumed = job.clear_up() if job is not None else None, len(parts.parts)
        else:
            resumed = len(parts.parts.keys() & set(job.finished)) if job is not None else 0
            if job is not None and resumed:
                progress.note(f"going on after {resumed} of {len(parts.parts)} parts that {job.folder} holds")
            keeper = JobKeeper(parts, job, ranks=ranks, strict=how.strict)
            loaded.reports = run_phases(settled, loaded, keeper, activations=how.activations, spill=how.spill, progress=progress)
            with ranks.together():
                written = _finish(job, keeper, manifest, loaded.reports, covering(loaded.reports)) if job is not None else None
    if written is None:
        return None
    assert written.manifest is not None
    loaded.reports = loaded.reports or [LayerReport.from_json(data) for data in written.manifest.layers]
    loaded.coverage = covering(loaded.reports)
    loaded.model = load_model(written, dtype=baseline or setup.torch_dtype)
    return Quantized(out, loaded, written.manifest, _record(loaded), resumed)


def _parts(checkpoint: Checkpoint, recipe: Recipe, setup: Setup) -> PartwiseModel:
    """Return the original, rotated where the recipe says so."""
    kind = settle_rotation(recipe.rotate, checkpoint.config, recipe.resolve())
    rotation = rotation_of(kind, checkpoint.config, setup.seed)
    if rotation is None:
        return PartwiseModel(checkpoint, setup.torch_dtype, setup.device)
    return RotatedModel(checkpoint, setup.torch_dtype, rotation, setup.device)


def _calibration(
    loaded: Loaded, recipe: Recipe, settled: Settled, how: Running, *, ranks: Ranks, progress: Progress
) -> tuple[CalibrationSet | None, OverlapCheck | None]:
    """Record or read the windows where a scheme needs some, and search them for the evaluation text."""
    if not settled.needs_calibration:
        return None, None
    config, source = loaded.checkpoint.config, recipe.calibration
    seen = calibration_set(loaded.tokenizer, config, source, seed=loaded.setup.seed, progress=progress)
    check = check_overlap(seen, loaded.tokenizer, eval_text=source.eval_text, progress=progress)
    if check.warning and how.strict:
        raise TextError(f"--strict: {check.warning}")
    if len(seen.tokens) < ranks.size:
        raise UsageError(f"{len(seen.tokens)} calibration windows cannot be shared by {ranks.size} processes; record more.")
    return seen, check


def _manifest(loaded: Loaded, recipe: Recipe, settled: Settled, check: OverlapCheck | None) -> Manifest:
    """Return what is known before the first weight is read."""
    seen = loaded.calibration
    packages = loaded.setup.environment().packages
    assert loaded.resolved is not None
    return Manifest(
        scheme=loaded.scheme,
        options=loaded.resolved.options_json(),
        overrides=[override.to_json() for override in recipe.overrides],
        allocation=None if recipe.allocation is None else dict(recipe.allocation),
        source={"name": loaded.name, "format": loaded.checkpoint.format, "sha256": loaded.checkpoint.sha256},
        calibration=calibration_json(seen.info, check) if seen and check else None,
        tokenizer_sha256=loaded.tokenizer.sha256,
        rotation=rotation_json(settled.rotate, loaded.setup.seed),
        seed=loaded.setup.seed,
        threads=torch.get_num_threads(),
        device=loaded.setup.device_name,
        versions={"llmq": __version__} | {name: packages[name] for name in _VERSIONED},
        dtype=float_grid(loaded.setup.torch_dtype).dtype,
    )


def _identity(manifest: Manifest, recipe: Recipe, seen: CalibrationSet | None, how: Running, ranks: Ranks) -> dict[str, Any]:
    """Return everything that the bytes of the result depend on."""
    described = {"scheme", "options", "overrides", "rotation", "tokenizer_sha256", "seed", "threads", "device"}
    known = manifest.model_dump(mode="json", include=described)
    calibration = {key: value for key, value in (manifest.calibration or {}).items() if key != "overlap"}
    return {
        "model": manifest.source["sha256"],
        **known,
        "skip": [*recipe.skip, f"lm_head={recipe.lm_head}", f"skip_unfit={recipe.skip_unfit}"],
        "calibration": calibration if seen is not None else None,
        "dtype": manifest.dtype,
        "activations": how.activations if seen is not None else None,
        "processes": ranks.size,
        "versions": manifest.versions,
        "cpu": torch.backends.cpu.get_cpu_capability() + (" with bf16" if has_bf16_dot() else ""),
    }


def _finish(job: Job, keeper: JobKeeper, manifest: Manifest, reports: list[LayerReport], covered: Coverage) -> Checkpoint:
    """Put the finished parts together."""
    names = list(keeper.parts.parts)
    formats: dict[str, dict[str, Any]] = {}
    distilled = all(job.entry(second_name(part)) is not None for part in names)
    names = [second_name(part) for part in names] if distilled else names
    for part in names:
        entry = job.entry(part)
        assert entry is not None
        formats |= entry["formats"]
        manifest = manifest.model_copy(update={"distillation": entry.get("distillation")})
    config = keeper.parts.checkpoint.config
    if config.tie_word_embeddings and format_from_json(formats["lm_head"]).quantized:
        config = replace(config, tie_word_embeddings=False)  # the head was quantized, and is no longer the embedding
    complete = manifest.model_copy(
        update={
            "skipped": _skipped(covered),
            "layers": [report.to_json() for report in reports],
            "formats": formats,
        }
    )
    return job.put_together(names, complete, config, keeper.parts.checkpoint)


def _covered(recipe: Recipe, settled: Settled, compute: torch.dtype, reports: list[LayerReport]) -> Coverage:
    """Return what became of every parameter."""
    dtypes = {decision.fqn: decision.parameter.dtype for decision in settled.decisions}
    noise = {report.fqn: report.sqnr_db for report in reports}
    return recipe.explain(
        coverage(settled.resolved.name, as_done(settled.decisions, reports), dtypes=dtypes, noise=noise, compute=compute)
    )


def _skipped(covered: Coverage) -> dict[str, str]:
    return {fqn: why for fqn, why in covered.skipped.items() if not why.startswith("not a linear")}


@contextmanager
def _at_work(job: Job | None) -> Iterator[None]:
    """Let others have the job's folder afterwards; say how to go on when the user stops the run."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = len(job.finished) if job is not None else 0
        where = f"; {done} parts are finished in {job.folder}" if job is not None and done else ""
        raise Interrupted(f"interrupted{where}: the same command goes on from there, --restart begins anew.") from error
    finally:
        if job is not None:
            job.release()


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
