"""Hugging Face's layout: config.json, and weights in one file, or in shards that an index or their headers tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.checkpoint.complete import check_complete
from llmq.checkpoint.sniff import Folder, Kind, sniff
from llmq.checkpoint.source import Checkpoint, TensorSource, WeightFile
from llmq.errors import CheckpointError
from llmq.model.config import LlamaConfig

QUANTIZATION_KEY = "quantization_config"
"""Key of config.json under which a tool that quantized the checkpoint names itself."""

_INDEX_KEY = "weight_map"


def hf_config_file(folder: Folder) -> Path | None:
    """Return the model's configuration in a folder, by its keys; None: there is none.

    Raises:
        CheckpointError: there are several.
    """
    found = [path for path in folder.configs("model_type") if _INDEX_KEY not in folder.objects[path]]
    found = found or [path for path in folder.configs("architectures") if _INDEX_KEY not in folder.objects[path]]
    if len(found) > 1:  # a part of a larger model (a vision tower's, a tokenizer's) may have one too
        found = [path for path in found if "hidden_size" in folder.objects[path]] or found
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(
            f"{folder.path} holds more than one model configuration ({names}); keep the one that belongs to it."
        )
    return found[0] if found else None


def read_hf_config(path: Path, data: Mapping[str, Any]) -> LlamaConfig:
    """Read a config.json; errors name the file."""
    quantized = data.get(QUANTIZATION_KEY)
    if quantized is not None:
        method = quantized.get("quant_method", "another tool") if isinstance(quantized, dict) else "another tool"
        raise CheckpointError(
            f"{path} says that the checkpoint was quantized by {method}; llmq takes the original (fp32, bf16 or fp16)."
        )
    try:
        return LlamaConfig.from_hf(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def indexed_files(folder: Folder) -> tuple[list[Path], Mapping[str, str]] | None:
    """Return the shards that the folder's index names, and the index's tensor -> file name; None: there is no index.

    An index whose shards are all absent is another format's (pytorch_model.bin.index.json beside safetensors is common),
    unless there are no weights at all.

    Raises:
        CheckpointError: a shard is missing or not weights, or there are several indexes.
    """
    indexes = {path: folder.objects[path][_INDEX_KEY] for path in folder.configs(_INDEX_KEY)}
    if not indexes:
        return None
    for path, index in indexes.items():
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"the index {path} is damaged: its weight_map must give a file for each tensor.")
    for kind in (Kind.SAFETENSORS, Kind.TORCH_ZIP):
        present = {path.name for path in folder.weights(kind)}
        usable = [path for path, index in indexes.items() if present & {*index.values()}]
        if len(usable) > 1:
            names = ", ".join(path.name for path in usable)
            raise CheckpointError(f"{folder.path} holds more than one index ({names}); keep the one to be used.")
        if usable:
            return _shards(folder, usable[0], indexes[usable[0]])
        if present:
            return None
    return _shards(folder, *next(iter(indexes.items())))


def _shards(folder: Folder, path: Path, index: Mapping[str, str]) -> tuple[list[Path], Mapping[str, str]]:
    for tensor, name in index.items():
        shard = folder.path / name
        if shard.parent != folder.path or not shard.is_file():
            raise CheckpointError(f"shard {name} of {path} is missing: it should hold tensor {tensor}; get the file.")
    shards = sorted({folder.path / name for name in index.values()})
    for shard in shards:
        kind = sniff(shard)
        if kind not in (Kind.SAFETENSORS, Kind.TORCH_ZIP):
            raise CheckpointError(f"shard {shard} of {path} is {kind.value}; get the file again.")
    return shards, index


def open_hf(folder: Folder, config_file: Path, files: list[WeightFile], index: Mapping[str, str] | None) -> Checkpoint:
    """Return the checkpoint that `config_file` and these files make.

    Raises:
        CheckpointError: the configuration cannot be used, or the tensors are not its model's.
    """
    config = read_hf_config(config_file, folder.objects[config_file])
    sources: dict[str, TensorSource] = {}
    for file in files:
        for name in file.entries:
            if name in sources:
                raise CheckpointError(f"tensor {name} is both in {sources[name].info.file} and in {file.path}; keep one of them.")
            sources[name] = TensorSource.stored(file, name)
    for name, shard in (index or {}).items():
        if name not in sources:
            raise CheckpointError(f"tensor {name} is missing in {folder.path / shard}, where the index says it is; get it again.")
    paths = [file.path for file in files]
    tensors = check_complete(config, sources, config_file, paths)
    return Checkpoint(folder.only or folder.path, "hf", config, tensors, paths, sources)
