"""save_model: a model on disk as llmq's artefact, whole or not at all, and read again to be sure.

    OUT/model.safetensors     canonical codes, scales and zero points; several shards and an index above 5 GB
    OUT/llmq.json             the manifest
    OUT/config.json           the model's shape, in Hugging Face's keys
    OUT/tokenizer…            copied from the source

Kernel layouts are never written: they are right on one kind of machine only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.artefact import stored_names
from llmq.checkpoint.complete import parameter_shapes
from llmq.checkpoint.detect import open_checkpoint
from llmq.checkpoint.hf import QUANTIZATION_KEY
from llmq.checkpoint.manifest import FILE_NAME, Manifest, StoredFile
from llmq.checkpoint.safetensors_file import write_safetensors
from llmq.checkpoint.source import EMBEDDING, HEAD, Checkpoint
from llmq.errors import OutputError, UsageError
from llmq.files import atomic_path, sha256_file
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama
from llmq.model.tokenizer import tokenizer_kind
from llmq.numerics.weight import float_grid, same_bits
from llmq.ops.tensor import QuantizedTensor
from llmq.progress import SILENT, Progress

MAX_SHARD_BYTES = 5_000_000_000
_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Files that belong to a tokenizer by convention of their names; copied when they are there, and not otherwise read."""


@dataclass(frozen=True)
class _Stored:
    """What goes into the files: tensors by their stored names, the formats by linear, and the configuration."""

    tensors: Mapping[str, Tensor]
    formats: dict[str, dict[str, Any]]
    config: LlamaConfig


def save_model(
    model: Llama,
    out: Path | str,
    *,
    manifest: Manifest,
    source: Checkpoint,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Write a model as an artefact, then open it again and compare every stored tensor with memory, bit by bit.

    Args:
        model: with plain or `QuantizedTensor` weights. One that is prepared for kernels is unpacked, which takes memory:
            save before `prepare`.
        out: the folder to make.
        manifest: how the model was made; what the files hold is filled in here.
        source: the original, whose tokenizer is copied.
        force: replace `out` when it exists.
        max_shard_bytes: largest file of weights; a single tensor may be larger.
        progress: told of each file.

    Returns:
        The artefact, opened.

    Raises:
        OutputError: `out` exists, cannot be written, or reads back differently.
        UsageError: parameters that are not quantized differ in dtype.
    """
    out = Path(out)
    stored = _stored(model)
    with atomic_path(out, force=force) as temporary:
        temporary.mkdir()
        files = _write_weights(temporary, stored.tensors, max_shard_bytes, progress)
        complete = manifest.model_copy(
            update={"dtype": float_grid(model.dtype).dtype, "formats": stored.formats, "weights": files}
        )
        write_descriptions(temporary, complete, stored.config, source)
        compare_stored(open_checkpoint(temporary).read, stored.tensors, out)
    return open_checkpoint(out)


def write_descriptions(folder: Path, manifest: Manifest, config: LlamaConfig, source: Checkpoint) -> None:
    """Write everything of an artefact that is not a weight: manifest, configuration and the original's tokenizer."""
    manifest.write(folder / FILE_NAME)
    data = config.to_hf()
    if any(form.quantized for form in manifest.linear_formats().values()):
        data[QUANTIZATION_KEY] = {"quant_method": "llmq"}  # so that nothing else takes the codes for weights
    _write_json(folder / "config.json", data)
    _copy_tokenizer(source, folder)


def _stored(model: Llama) -> _Stored:
    config = model.config
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if config.tie_word_embeddings and not _is_tied(parameters):
        config = replace(config, tie_word_embeddings=False)  # the head was quantized, and is no longer the embedding
    tensors: dict[str, Tensor] = {}
    formats: dict[str, dict[str, Any]] = {}
    for name in (*parameter_shapes(config), *([HEAD] if config.tie_word_embeddings else [])):
        own, form = stored_parameter(name, parameters[name], model.dtype)
        if form is not None:
            formats[name.removesuffix(".weight")] = form
        if name != HEAD or not config.tie_word_embeddings:
            tensors |= own
    return _Stored(tensors, formats, config)


def stored_parameter(name: str, value: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors that are stored for a parameter, by their names, and the format of a linear's weight.

    Raises:
        UsageError: it is not quantized, and of another dtype than `dtype`, the model's.
    """
    form = value.format if isinstance(value, QuantizedTensor) else None
    stored = value.weight.tensors if isinstance(value, QuantizedTensor) else (value,)
    if not (form and form.quantized) and stored[0].dtype != dtype:
        raise UsageError(f"{name} is {stored[0].dtype}, the model {dtype}; cast it to one dtype before saving it.")
    return dict(zip(stored_names(name, form), stored, strict=True)), form.to_json() if form else None


def _is_tied(parameters: Mapping[str, Tensor]) -> bool:
    """Whether the head still is the embedding: the same memory, or at least the same numbers."""
    head, embedding = parameters[HEAD], parameters[EMBEDDING]
    if isinstance(head, QuantizedTensor):
        if head.format.quantized:
            return False
        head = head.weight.qdata
    return head.dtype == embedding.dtype and torch.equal(head, embedding)


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int, progress: Progress
) -> dict[str, StoredFile]:
    """Write the shards (and their index when there are several); return hash and size by file name."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += nbytes
    names = shard_names(len(shards))
    files = {}
    with progress.task("writing", total=len(shards)) as advance:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, shard)
            files[name] = StoredFile(sha256=sha256_file(folder / name), nbytes=(folder / name).stat().st_size)
            advance(1)
    write_index(folder, dict(zip(names, shards, strict=True)))
    return files


def shard_names(count: int) -> list[str]:
    """Return the names of an artefact's files of weights."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index that Hugging Face's readers want of several shards; each tensor has its `nbytes`."""
    if len(shards) == 1:
        return
    total = sum(value.nbytes for shard in shards.values() for value in shard.values())
    weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_tokenizer(source: Checkpoint, folder: Path) -> None:
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and (path.name in _COMPANIONS or tokenizer_kind(path)):
            shutil.copyfile(path, folder / path.name)


def compare_stored(read: Callable[[str], Tensor], tensors: Mapping[str, Tensor], out: Path) -> None:
    """Compare what was written with memory, bit by bit; OutputError where it differs."""
    for name, tensor in tensors.items():
        if not same_bits(read(name), tensor.cpu()):
            raise OutputError(
                f"tensor {name} of {out} reads back differently from what was written; check the disk and write again."
            )


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
