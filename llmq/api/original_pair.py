"""A quantized model and the original it was made from, side by side in memory, and a text that neither was calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from llmq.api.loading import Loaded, Setup, open_model
from llmq.api.recipes import Recipe
from llmq.api.sizes import is_quantized
from llmq.calibration.corpus import TextSource, resolve_text
from llmq.calibration.overlap import WARN_SHARE, overlap
from llmq.calibration.recorder import CalibrationSet
from llmq.checkpoint import Checkpoint, open_checkpoint
from llmq.checkpoint.rotated import settle_rotation
from llmq.errors import UsageError
from llmq.progress import SILENT, Progress

_SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True, eq=False)
class Pair:
    """The two models, ready to run in the same compute dtype.

    Attributes:
        model: the quantized one.
        original: what it was made from.
        twin: the original in the quantized model's coordinates: the same function, rotated as that was; else the original itself.
        linears: names of the quantized linears, in the model's order; at least one.
        notes: what a reader of any comparison has to know.
    """

    model: Loaded
    original: Loaded
    twin: Loaded
    linears: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_pair(path: str, recipe: Recipe | None, setup: Setup, reference: str | None, *, progress: Progress = SILENT) -> Pair:
    """Load a quantized model and its original.

    Args:
        path: llmq's artefact, or an original checkpoint that `recipe` is applied to.
        recipe: a scheme; None: `path` is an artefact.
        setup: where and how both run.
        reference: the original checkpoint; None: `path` itself, where it is one.
        progress: hears of loading and quantizing.

    Raises:
        UsageError: nothing is quantized, the original is missing or quantized too, the two do not belong together, or they do
            not fit into memory.
        LlmqError: see `open_model`.
    """
    setup.apply()
    checkpoint = open_checkpoint(path)
    artefact = checkpoint.manifest is not None
    if recipe is None and not artefact:
        raise UsageError(
            f"{path} is not quantized, so there is no loss to explain; name a scheme with --scheme, or an artefact that "
            "`llmq quantize` wrote."
        )
    if recipe is not None and recipe.resolve().baseline_dtype is not None:
        raise UsageError(f"scheme {recipe.scheme} quantizes no linear, so there is no loss to explain; name another.")
    if artefact and reference is None:
        raise UsageError(f"{path} is quantized; name the original checkpoint that it was made from with --reference.")
    other = checkpoint if reference is None else open_checkpoint(reference)
    if other.manifest is not None and not (artefact and recipe is not None):
        raise UsageError(f"the reference {reference} is quantized itself (scheme {other.manifest.scheme}); name the original.")
    check_shapes(path, checkpoint, reference or path, other)
    turned = _rotation(checkpoint, recipe, setup)
    _check_memory(checkpoint, other, setup.torch_dtype, rotated=turned is not None)
    model = open_model(path, recipe, setup, progress=progress)
    linears = tuple(
        fqn for fqn, module in model.model.named_modules() if isinstance(module, torch.nn.Linear) and is_quantized(module.weight)
    )
    if not linears:
        raise UsageError(f"no linear of {path} is quantized, so there is no loss to explain; quantize some.")
    original = open_model(reference or path, None, setup, progress=progress)
    twin = original
    if turned is not None:
        kind, seed = turned
        twin = open_model(reference or path, Recipe(setup.dtype, rotate=kind), replace(setup, seed=seed), progress=progress)
    notes = [*checkpoint.notes]
    if turned is not None:
        notes.append(
            "the model was rotated before it was quantized; its linears are compared with those of the original, rotated alike"
        )
    source = checkpoint.manifest.source if checkpoint.manifest is not None else {}
    if source and source.get("sha256") != other.sha256:
        notes.append(f"{path} says that it was made from another checkpoint than {reference} ({source.get('name')})")
    return Pair(model, original, twin, linears, tuple(notes))


def _rotation(checkpoint: Checkpoint, recipe: Recipe | None, setup: Setup) -> tuple[str, int] | None:
    """Return what was rotated, or is to be, and the seed; None: nothing."""
    manifest = checkpoint.manifest
    if manifest is not None:
        return None if manifest.rotation is None else (manifest.rotation["kind"], manifest.rotation["seed"])
    assert recipe is not None
    kind = settle_rotation(recipe.rotate, checkpoint.config, recipe.resolve())
    return None if kind == "none" else (kind, setup.seed)


def check_shapes(path: str, checkpoint: Checkpoint, reference: str, other: Checkpoint) -> None:
    """Raise UsageError when two checkpoints are not of one architecture; names the first number that differs."""
    for name in _SHAPES:
        mine, theirs = getattr(checkpoint.config, name), getattr(other.config, name)
        if mine != theirs:
            raise UsageError(
                f"{path} has {name} {mine}, and the reference {reference} {theirs}; name the checkpoint that it was made from."
            )


def check_text(model: Loaded, calibration: CalibrationSet | None, text: TextSource, evaluated: str) -> list[str]:
    """Refuse a text that the model, or its candidates, were calibrated on; return what cannot be known.

    Args:
        model: the quantized model.
        calibration: windows that candidates are calibrated with; None: none are.
        text: where the windows come from that losses are measured on.
        evaluated: those windows as text.

    Raises:
        UsageError: the calibration text is this text, or holds `overlap.WARN_SHARE` of the windows' passages.
    """
    for seen in (model.calibration, calibration):
        if seen is not None:
            _refuse_same(seen.info.to_json(), text)
            _refuse(overlap(seen.text(model.tokenizer), evaluated).share, text)
    manifest = model.checkpoint.manifest
    if manifest is None or manifest.calibration is None:
        return []
    _refuse_same(manifest.calibration, text)
    source = resolve_text(split="train")
    if source.sha256 in _sources(manifest.calibration):
        _refuse(overlap(source.raw(), evaluated).share, text)
        return []
    searched = manifest.calibration.get("overlap") or {}
    if searched.get("text_sha256") == text.sha256:
        _refuse(searched["share"], text)
        return []
    return [f"the model was calibrated on {manifest.calibration['source']}, which is not here to be searched for these passages"]


def _sources(calibration: Mapping[str, Any]) -> set[str]:
    """Return the hashes of what calibration windows were cut from."""
    return {calibration["source_sha256"], *(part["sha256"] for part in calibration["parts"])}


def _refuse_same(calibration: Mapping[str, Any], text: TextSource) -> None:
    if text.sha256 in _sources(calibration):
        raise UsageError(
            f"{text.name} is the text that was calibrated on, where losses look too small; name another with --text."
        )


def _refuse(share: float, text: TextSource) -> None:
    if share >= WARN_SHARE:
        raise UsageError(
            f"the calibration text holds {share:.1%} of the passages of the windows of {text.name}, where losses look too small; "
            "name another text with --text."
        )


def _check_memory(checkpoint: Checkpoint, other: Checkpoint, dtype: torch.dtype, *, rotated: bool) -> None:
    """Raise UsageError when all models do not fit; one that is still to be quantized counts as the original."""
    floats = sum(info.nbytes // info.dtype.itemsize for info in other.tensors.values()) * dtype.itemsize
    stored = floats if checkpoint.manifest is None else sum(info.nbytes for info in checkpoint.tensors.values())
    needed, free = floats * (2 if rotated else 1) + stored, int(psutil.virtual_memory().available)
    if needed > free:
        raise UsageError(
            f"the model and its original take {needed / 1e9:.1f} GB together, and {free / 1e9:.1f} GB of memory are free; both "
            "have to be in memory: explain a smaller model of the family, or use a larger machine."
        )
