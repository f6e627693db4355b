"""open_checkpoint: what kind of checkpoint is this? Decided by what files contain; a renamed file changes nothing.

A folder may hold the same model several times (Hugging Face's safetensors, Meta's files, gpt-fast's). The first of these is
taken, and a note says what was left out: llmq's artefact, Hugging Face, Meta, gpt-fast, llama2.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmq.checkpoint.artefact import find_manifest, open_artefact
from llmq.checkpoint.complete import check_complete
from llmq.checkpoint.hf import hf_config_file, indexed_files, open_hf, read_hf_config
from llmq.checkpoint.llama2c import Llama2cFile
from llmq.checkpoint.meta import IGNORED, PARAMS_KEYS, gpt_fast_sources, meta_config, meta_sources
from llmq.checkpoint.safetensors_file import SafetensorsFile
from llmq.checkpoint.sniff import Folder, Kind, sniff
from llmq.checkpoint.source import Checkpoint, Format, WeightFile, refuse_quantized
from llmq.checkpoint.torch_file import NotTensorsError, TorchFile
from llmq.errors import CheckpointError

_READABLE = (
    "Hugging Face (safetensors and config.json), Meta (consolidated.*.pth and params.json), gpt-fast (model.pth), llama2.c"
)
_ADVICE = {
    Kind.TORCH_LEGACY: "load and save it with a torch of today (torch.save writes zip files), or convert it to safetensors",
    Kind.PICKLE: "llmq executes no pickle; convert it to safetensors",
    Kind.LFS_POINTER: "run `git lfs pull` where it came from",
    Kind.GGUF: "llmq reads the original it was made from",
    Kind.EMPTY: "get the file again",
    Kind.JSON: "name the folder, or the file that holds the weights",
}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint, a folder or a file, without reading its weights.

    Raises:
        CheckpointError: it does not exist, is of no known kind, is truncated or incomplete, or belongs to an architecture
            that llmq does not know.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; name a folder or a file that holds one ({_READABLE}).")
    if path.is_file():
        kind = sniff(path)
        if kind not in (Kind.SAFETENSORS, Kind.TORCH_ZIP, Kind.LLAMA2C):
            raise CheckpointError(_refusal(path, kind))
        return _open_files(Folder(path.parent, only=path))
    folder = Folder(path)
    if not folder.kinds:
        raise CheckpointError(f"folder {path} holds no files; name one that holds a checkpoint ({_READABLE}).")
    manifest_file = find_manifest(folder)
    return open_artefact(folder, manifest_file) if manifest_file else _open_files(folder)


def _open_files(folder: Folder) -> Checkpoint:
    """Open what is not llmq's own."""
    config_file = hf_config_file(folder)
    named = indexed_files(folder) if folder.only is None else None
    index = named[1] if named else None
    shards = named[0] if named else folder.weights(Kind.SAFETENSORS)
    files: list[WeightFile] = [SafetensorsFile(path) if sniff(path) is Kind.SAFETENSORS else TorchFile(path) for path in shards]
    groups = _by_layout(files)
    if "llmq" in groups:
        raise CheckpointError(
            f"{groups['llmq'][0].path} is a part of llmq's artefact; name its folder, which must hold the manifest too."
        )
    notes: list[str] = []
    if not ({"hf", "meta", "gpt-fast"} & groups.keys() or (groups and config_file)):
        torch_files, notes = _torch_files(folder.weights(Kind.TORCH_ZIP))
        groups = _by_layout([*files, *torch_files])
    if config_file and ("hf" in groups or (None in groups and len(groups) == 1)):
        opened = open_hf(folder, config_file, groups.get("hf") or groups[None], index)
    elif "meta" in groups:
        opened = _open_named_by_meta(folder, groups["meta"], "meta")
    elif "gpt-fast" in groups:
        opened = _open_named_by_meta(folder, [_the_original(groups["gpt-fast"])], "gpt-fast")
    elif "hf" in groups:
        raise CheckpointError(_without_config(folder, groups["hf"][0].path, "config.json"))
    elif folder.weights(Kind.LLAMA2C):
        opened = _open_llama2c(folder)
    else:
        raise CheckpointError(_nothing(folder))
    used = {*opened.files}
    others = [path for path in folder.weights(Kind.SAFETENSORS, Kind.TORCH_ZIP, Kind.LLAMA2C) if path not in used]
    if others:
        notes.append(f"left out: {', '.join(path.name for path in others)} (name the file to use it)")
    return opened.with_notes(*notes)


def _by_layout(files: Sequence[WeightFile]) -> dict[Format | None, list[WeightFile]]:
    groups: dict[Format | None, list[WeightFile]] = {}
    for file in files:
        groups.setdefault(_layout(file), []).append(file)
    return groups


def _layout(file: WeightFile) -> Format | None:
    """Return whose names the tensors have; None: nobody's that llmq knows."""
    names = file.entries
    if any(name.endswith(".weight.qdata") for name in names):
        return "llmq"
    if any(".attention.wqkv." in name for name in names):
        return "gpt-fast"
    if "tok_embeddings.weight" in names:
        return "meta"
    return "hf" if any(name.startswith(("model.", "lm_head.")) for name in names) else None


def _torch_files(paths: list[Path]) -> tuple[list[WeightFile], list[str]]:
    """Open torch files; those that hold no tensors (a trainer's arguments) are left out, unless there are no others."""
    files: list[WeightFile] = []
    refused: list[NotTensorsError] = []
    for path in paths:
        try:
            files.append(TorchFile(path))
        except NotTensorsError as error:
            refused.append(error)
    if refused and not files:
        raise refused[0]
    return files, [str(error) for error in refused]


def _the_original(files: list[WeightFile]) -> WeightFile:
    """Of gpt-fast's files for one model, which often lie in one folder, return the one that is not quantized."""
    originals = []
    for file in files:
        try:
            for name, info in file.entries.items():
                refuse_quantized(name, info)
        except CheckpointError:
            if len(files) == 1:
                raise
            continue
        originals.append(file)
    if len(originals) != 1:
        names = ", ".join(file.path.name for file in originals or files)
        raise CheckpointError(f"{files[0].path.parent} holds several gpt-fast checkpoints ({names}); name the file to use.")
    return originals[0]


def _open_named_by_meta(folder: Folder, files: list[WeightFile], form: Format) -> Checkpoint:
    """Open Meta's or gpt-fast's files with the configuration beside them: of either maker, the format's own first."""
    names = {name for file in files for name in file.entries}
    tied = "output.weight" not in names or (isinstance(files[0], TorchFile) and _shares_embedding(files[0]))
    hf_file = hf_config_file(folder)
    params = folder.configs(*PARAMS_KEYS)
    if len(params) > 1:
        listed = ", ".join(path.name for path in params)
        raise CheckpointError(
            f"{folder.path} holds more than one params.json ({listed}); keep the one that belongs to the model."
        )
    notes: list[str] = []
    if params and (form == "meta" or hf_file is None):
        config_file = params[0]
        config, notes = meta_config(config_file, folder.objects[config_file], files, tied=tied)
    elif hf_file is not None:
        config_file = hf_file
        config = read_hf_config(hf_file, folder.objects[hf_file])
    else:
        raise CheckpointError(_without_config(folder, files[0].path, "params.json (Meta) or config.json (Hugging Face)"))
    sources = meta_sources(files, config) if form == "meta" else gpt_fast_sources(files[0], config)
    paths = [file.path for file in files]
    tensors = check_complete(config, sources, config_file, paths, ignored=IGNORED)
    return Checkpoint(folder.only or folder.path, form, config, tensors, paths, sources, notes=tuple(notes))


def _shares_embedding(file: TorchFile) -> bool:
    return file.same_memory("tok_embeddings.weight", "output.weight")


def _open_llama2c(folder: Folder) -> Checkpoint:
    paths = folder.weights(Kind.LLAMA2C)
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise CheckpointError(f"{folder.path} holds several llama2.c checkpoints ({names}); name the file to use.")
    file = Llama2cFile(paths[0])
    config = file.config()
    sources = meta_sources([file], config)
    tensors = check_complete(config, sources, file.path, [file.path])
    return Checkpoint(folder.only or folder.path, "llama2c", config, tensors, [file.path], sources)


def _without_config(folder: Folder, weights: Path, wanted: str) -> str:
    if folder.damaged:
        return f"{folder.damaged[0]} is not valid JSON, and no other file beside {weights} describes the model; get it again."
    return (
        f"{weights} does not say how many heads the model has, its RoPE base and its norm's epsilon, and there is no {wanted} "
        f"beside it that does; put the model's into {folder.path}."
    )


def _nothing(folder: Folder) -> str:
    """Return why nothing in a folder is a checkpoint: the nearest thing to one is named."""
    paths = [folder.only] if folder.only else list(folder.kinds)
    kinds = {path: folder.kinds.get(path) or sniff(path) for path in paths}
    for kind in (Kind.LFS_POINTER, Kind.TORCH_LEGACY, Kind.PICKLE, Kind.GGUF, Kind.EMPTY):
        for path, found in kinds.items():
            if found is kind:
                return _refusal(path, kind)
    if folder.damaged:
        return f"{folder.damaged[0]} is not valid JSON, and {folder.path} holds no weights; get the checkpoint again."
    weights = folder.weights(Kind.SAFETENSORS, Kind.TORCH_ZIP)
    if weights:
        return f"{weights[0]} holds no tensors with names that llmq knows; readable are {_READABLE}."
    return f"{folder.path} is not a checkpoint: it holds no weights; readable are {_READABLE}."


def _refusal(path: Path, kind: Kind) -> str:
    return f"{path} is {kind.value}; {_ADVICE.get(kind, f'readable are {_READABLE}')}."
