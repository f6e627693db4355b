"""A quantized model and the original it was made from, side by side in memory, and a text that neither was calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from llmq.api.loading import Loaded, Setup, open_model
from llmq.api.recipes import Recipe
from llmq.api.sizes import is_integer
from llmq.calibration.corpus import TextSource, resolve_text
from llmq.calibration.overlap import WARN_SHARE, overlap
from llmq.calibration.recorder import CalibrationSet
from llmq.checkpoint import Checkpoint, open_checkpoint
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
        linears: names of the linears on an integer grid, in the model's order; at least one.
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
    _check_memory(checkpoint, other, setup.torch_dtype)
    model = open_model(path, recipe, setup, progress=progress)
    linears = tuple(
        fqn for fqn, module in model.model.named_modules() if isinstance(module, torch.nn.Linear) and is_integer(module.weight)
    )
    if not linears:
        raise UsageError(f"no linear of {path} is on an integer grid, so there is no loss to explain; quantize some.")
    original = open_model(reference or path, None, setup, progress=progress)
    notes = [*checkpoint.notes]
    source = checkpoint.manifest.source if checkpoint.manifest is not None else {}
    if source and source.get("sha256") != other.sha256:
        notes.append(f"{path} says that it was made from another checkpoint than {reference} ({source.get('name')})")
    return Pair(model, original, original, linears, tuple(notes))


def check_shapes(path: str, checkpoint: Checkpoint, reference: str, other: Checkpoint) -> None:
    """Raise UsageError when two checkpoints are not of one architecture; names the first number that differs."""
    for name in _SHAPES:
        mine, theirs = getattr(checkpoint.config, name), getattr(other.config, name)
        if mine != theirs:
            raise UsageError(
                f"{path} has {name} {mine}, and the reference {reference} {theirs}; name the checkpoint that it was made from."
            )


def check_text(model: Loaded, calibration: CalibrationSet | None, text: TextSource) -> list[str]:
    """Refuse a text that the model, or its candidates, were calibrated on; return what cannot be known.

    Raises:
        UsageError: the calibration text holds `overlap.WARN_SHARE` of the text's passages, or is the text.
    """
    manifest = model.checkpoint.manifest
    for seen in (model.calibration, calibration):
        if seen is not None:
            _refuse(overlap(seen.text(model.tokenizer), text.raw()).share, text)
    if manifest is None or manifest.calibration is None:
        return []
    return _check_recorded(manifest.calibration, text)


def _check_recorded(calibration: Mapping[str, Any], text: TextSource) -> list[str]:
    """Compare the text with what a manifest says of calibration windows, which are not there any more."""
    named = {calibration["source_sha256"], *(part["sha256"] for part in calibration.get("parts", ()))}
    if text.sha256 in named:
        _refuse(1.0, text)
    searched = calibration.get("overlap") or {}
    if searched.get("text_sha256") == text.sha256:
        _refuse(searched["share"], text)
        return []
    source = resolve_text(split="train")
    if source.sha256 in named:
        _refuse(overlap(source.raw(), text.raw()).share, text)
        return []
    return [f"the model was calibrated on {calibration['source']}, which is not here to be searched for passages of the text"]


def _refuse(share: float, text: TextSource) -> None:
    if share >= WARN_SHARE:
        raise UsageError(
            f"the calibration text holds {share:.1%} of the passages of {text.name}, where losses would look too small; "
            "name another text with --text."
        )


def _check_memory(checkpoint: Checkpoint, other: Checkpoint, dtype: torch.dtype) -> None:
    """Raise UsageError when two models do not fit; one that is still to be quantized counts as the original."""
    floats = sum(info.nbytes // info.dtype.itemsize for info in other.tensors.values()) * dtype.itemsize
    stored = floats if checkpoint.manifest is None else sum(info.nbytes for info in checkpoint.tensors.values())
    free = int(psutil.virtual_memory().available)
    if floats + stored > free:
        raise UsageError(
            f"the model and its original take {(floats + stored) / 1e9:.1f} GB together, and {free / 1e9:.1f} GB of memory are "
            "free; both have to be in memory: explain a smaller model of the family, or use a larger machine."
        )
