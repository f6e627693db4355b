"""llmq's own artefact: the canonical codes that `store` wrote, told from other safetensors by their manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.complete import parameter_shapes
from llmq.checkpoint.hf import QUANTIZATION_KEY, hf_config_file, read_hf_config
from llmq.checkpoint.manifest import KIND, Manifest, parse_manifest
from llmq.checkpoint.safetensors_file import SafetensorsFile
from llmq.checkpoint.sniff import Folder
from llmq.checkpoint.source import HEAD, Checkpoint, TensorInfo, TensorSource
from llmq.errors import CheckpointError, ShapeError, UsageError
from llmq.model.config import LlamaConfig
from llmq.numerics.grid import FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, check_input_scale, torch_dtype

QDATA, SCALE, ZERO_POINT, INPUT_SCALE = ".qdata", ".scale", ".zero_point", ".input_scale"


def find_manifest(folder: Folder) -> Path | None:
    """Return the manifest in a folder, by its content; None: the folder is not an artefact.

    Raises:
        CheckpointError: there are several.
    """
    found = [path for path in folder.configs("kind", "schema_version") if folder.objects[path]["kind"] == KIND]
    if len(found) > 1:
        raise CheckpointError(f"{folder.path} holds more than one manifest ({', '.join(path.name for path in found)}); keep one.")
    return found[0] if found else None


def open_artefact(folder: Folder, manifest_file: Path) -> Checkpoint:
    """Open an artefact.

    Raises:
        CheckpointError: the manifest is newer or invalid, a file is missing, or the tensors are not those it describes.
    """
    manifest = parse_manifest(manifest_file, folder.objects[manifest_file])
    config_file = hf_config_file(folder)
    if config_file is None:
        raise CheckpointError(f"{folder.path} has a manifest and no config.json; quantize the original again.")
    data = {key: value for key, value in folder.objects[config_file].items() if key != QUANTIZATION_KEY}
    config = read_hf_config(config_file, data)
    files = []
    for name in manifest.weights:
        path = folder.path / name
        if path.parent != folder.path or not path.is_file():
            raise CheckpointError(f"file {name} of {manifest_file} is missing in {folder.path}; copy the artefact whole.")
        files.append(SafetensorsFile(path))
    sources = {name: TensorSource.stored(file, name) for file in files for name in file.entries}
    tensors = _check(config, manifest, sources, manifest_file)
    return Checkpoint(folder.path, "llmq", config, tensors, [file.path for file in files], sources, manifest)


def stored_names(parameter: str, form: LinearFormat | None) -> list[str]:
    """Return the names under which a parameter is stored: one, or those of `QuantizedWeight.tensors` in their order."""
    if form is None or not form.quantized:
        return [parameter]
    parts = [QDATA, SCALE]
    if isinstance(form.weight, IntGrid) and form.weight.zero_point != "none":
        parts.append(ZERO_POINT)
    if form.has_input_scale:
        parts.append(INPUT_SCALE)
    return [parameter + part for part in parts]


def assemble(parameter: str, form: LinearFormat, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Make a weight of its stored tensors; ShapeError and UsageError when they do not belong to the format and the shape."""
    n, k = shape
    weight = QuantizedWeight(
        form.weight,
        (n, k),
        tensors[parameter + QDATA],
        tensors[parameter + SCALE],
        tensors.get(parameter + ZERO_POINT),
        tensors.get(parameter + INPUT_SCALE),
    )
    check_input_scale(form.activation, weight.input_scale)
    return weight


def formats_by_parameter(manifest: Manifest) -> dict[str, LinearFormat]:
    """Return the formats by the name of the weight instead of that of the linear."""
    return {f"{fqn}.weight": form for fqn, form in manifest.linear_formats().items()}


def _check(
    config: LlamaConfig, manifest: Manifest, sources: Mapping[str, TensorSource], manifest_file: Path
) -> dict[str, TensorInfo]:
    """Return what is known of each stored tensor; refuse what the manifest does not describe."""
    formats = formats_by_parameter(manifest)
    tensors: dict[str, TensorInfo] = {}
    shapes = parameter_shapes(config)
    unknown = [name for name in formats if name not in shapes and not (name == HEAD and config.tie_word_embeddings)]
    if unknown:
        raise CheckpointError(f"{manifest_file} gives a format to {unknown[0]}, which the model does not have; it is damaged.")
    for parameter, shape in shapes.items():
        form = formats.get(parameter)
        names = stored_names(parameter, form)
        for name in names:
            if name not in sources:
                raise CheckpointError(f"tensor {name} is missing, though {manifest_file} describes it; copy the artefact whole.")
            tensors[name] = sources[name].info
        if form is not None and form.quantized:
            held = {name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta") for name in names}
            try:
                assemble(parameter, form, shape, held)
            except (ShapeError, UsageError) as error:
                file = tensors[names[0]].file
                raise CheckpointError(f"tensor {parameter} in {file} is not what {manifest_file} describes: {error}") from error
            continue
        info = tensors[parameter]
        dtype = manifest.dtype
        assert dtype is not None  # parse_manifest
        if form is not None and form.weight != FloatGrid(dtype):
            raise CheckpointError(f"{manifest_file} has {parameter} in {form.weight}, and the model in {dtype}; it is damaged.")
        if info.shape != shape or info.dtype != torch_dtype(dtype):
            raise CheckpointError(
                f"tensor {parameter} in {info.file} is {info.dtype} {list(info.shape)}, {manifest_file} describes torch.{dtype} "
                f"{list(shape)}; the two do not belong together."
            )
    extra = [name for name in sources if name not in tensors]
    if extra:
        raise CheckpointError(f"tensor {extra[0]} in {sources[extra[0]].info.file} is not described by {manifest_file}.")
    return tensors
