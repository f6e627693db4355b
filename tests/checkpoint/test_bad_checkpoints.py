"""Every bad input is one sentence that names the file, and the tensor where one is concerned."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writers import Writer
from safetensors.torch import save_file

from llmq.checkpoint import load_model, open_checkpoint
from llmq.errors import CheckpointError, UsageError


def refused(path: Path, *parts: str, load: bool = False) -> None:
    """Opening (and loading) must fail with one sentence that has all of `parts`."""
    action = (lambda: load_model(open_checkpoint(path))) if load else (lambda: open_checkpoint(path))
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for part in parts:
        assert part in message


def cut(path: Path, nbytes: int) -> None:
    os.truncate(path, path.stat().st_size - nbytes)


def change_json(path: Path, **changes: Any) -> None:
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "absent", str(tmp_path / "absent"), "does not exist")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "holds no files")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, str(tmp_path), "is not a checkpoint", "Hugging Face")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is an empty file"),
        (b"hello world, this is text\n" * 10, "no weights that llmq knows"),
        (b'{"model_type": "llama"}', "is a JSON file; name the folder"),
        (b"GGUF" + bytes(100), "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (pickle.dumps({"a": 1}), "is a bare Python pickle; llmq executes no pickle"),
    ],
    ids=["empty", "text", "json", "gguf", "lfs", "pickle"],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, str(path), says)
    if b"model_type" not in content:
        refused(tmp_path, str(tmp_path), says if b"hello" not in content else "is not a checkpoint")


def test_a_torch_file_of_the_old_form(writer: Writer) -> None:
    folder = writer.meta()
    path = folder / "consolidated.00.pth"
    torch.save(writer.meta_state(), path, _use_new_zipfile_serialization=False)
    refused(path, str(path), "before torch 1.6", "torch.save")
    refused(folder, str(path), "before torch 1.6")


@pytest.mark.parametrize("nbytes", [1, 20000, 40000])
def test_truncated_safetensors(writer: Writer, nbytes: int) -> None:
    folder = writer.hf()
    path = folder / "model.safetensors"
    cut(path, nbytes)
    refused(folder, str(path), "is truncated: tensor ", "get the file again")


def test_safetensors_truncated_in_the_header(writer: Writer) -> None:
    folder = writer.hf()
    os.truncate(folder / "model.safetensors", 100)
    refused(folder, str(folder / "model.safetensors"), "is truncated: its header needs")


def test_safetensors_with_bytes_at_the_end(writer: Writer) -> None:
    folder = writer.hf()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(folder, str(folder / "model.safetensors"), "has 4 bytes after its last tensor")


def rewrite_header(path: Path, name: str, **changes: Any) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[name].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "F4"}, "has dtype F4"),
        ({"shape": [31]}, "has 128 bytes, its shape [31] in F32 needs 124"),
        ({"data_offsets": [0, 128]}, "begins at byte 0 instead of"),
        ({"data_offsets": "x"}, "is damaged at tensor model.norm.weight"),
        ({"data_offsets": [-128, 0]}, "begins at byte -128"),
    ],
)
def test_safetensors_with_a_damaged_header(writer: Writer, changes: dict[str, Any], says: str) -> None:
    folder = writer.hf()
    rewrite_header(folder / "model.safetensors", "model.norm.weight", **changes)
    refused(folder, str(folder / "model.safetensors"), says)


def test_safetensors_whose_header_is_not_json(writer: Writer) -> None:
    folder = writer.hf()
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[9] = 0
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder, str(folder / "model.safetensors"), "is not valid JSON")


@pytest.mark.parametrize("nbytes", [1, 30000])
def test_a_truncated_torch_file(writer: Writer, nbytes: int) -> None:
    folder = writer.gpt_fast()
    cut(folder / "model.pth", nbytes)
    refused(folder, str(folder / "model.pth"), "is truncated")


def test_a_torch_file_with_a_damaged_pickle(writer: Writer) -> None:
    folder = writer.gpt_fast()
    raw = (folder / "model.pth").read_bytes()
    (folder / "model.pth").write_bytes(raw.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"))
    refused(folder, str(folder / "model.pth"))


@pytest.mark.parametrize("version", [0, 1])
def test_a_truncated_llama2c_file(writer: Writer, version: int) -> None:
    folder = writer.llama2c(version=version)
    cut(folder / "model.bin", 4)
    refused(folder, str(folder / "model.bin"), "is truncated: tensor output.weight")


def test_a_llama2c_file_with_bytes_at_the_end(writer: Writer) -> None:
    folder = writer.llama2c()
    with (folder / "model.bin").open("ab") as file:
        file.write(bytes(8))
    refused(folder, str(folder / "model.bin"), "has 8 bytes more")


@pytest.mark.parametrize(("version", "says"), [(2, "quantized to int8 already"), (3, "llama2.c's version 3")])
def test_llama2c_versions_that_are_not_read(writer: Writer, version: int, says: str) -> None:
    folder = writer.llama2c(version=version)
    refused(folder, str(folder / "model.bin"), says)


def test_a_llama2c_file_with_a_damaged_header_or_table(writer: Writer) -> None:
    path = writer.llama2c(version=1) / "model.bin"
    raw = bytearray(path.read_bytes())
    raw[8 + 12 : 8 + 16] = (5).to_bytes(4, "little")  # five heads do not divide a width of 32
    path.write_bytes(raw)
    refused(path, str(path), "heads 5")
    os.truncate(path, 200)
    refused(path, str(path), "is truncated")
    path = writer.llama2c("tables") / "model.bin"
    raw = bytearray(path.read_bytes())
    config, width = writer.config, writer.config.head_dim // 2
    end = len(raw) - 4 * config.vocab_size * config.hidden_size
    sines = end - 4 * config.max_position_embeddings * width
    raw[sines + 4 * width : sines + 8 * width] = bytes(4 * width)
    path.write_bytes(raw)
    refused(path, str(path), "RoPE tables")


def test_a_missing_shard(writer: Writer) -> None:
    folder = writer.hf(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors", "is missing", "it should hold tensor ")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    refused(folder, "model-00001-of-00003.safetensors", "is missing")


def test_a_shard_that_is_not_weights(writer: Writer) -> None:
    folder = writer.hf(shards=3)
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, str(folder / "model-00002-of-00003.safetensors"), "Git LFS pointer")


def test_an_index_that_leaves_the_folder(writer: Writer) -> None:
    folder = writer.hf(shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shutil.move(folder / "model-00002-of-00002.safetensors", folder.parent)
    index["weight_map"] = {name: shard.replace("model-00002", "../model-00002") for name, shard in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "../model-00002-of-00002.safetensors", "is missing")


def test_an_index_that_names_a_tensor_its_shard_lacks(writer: Writer) -> None:
    folder = writer.hf(shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    save_file({"model.norm.weight": writer.state["model.norm.weight"]}, shard)
    refused(folder, str(shard), "tensor ", "is missing in", "where the index says it is")


def test_a_damaged_index(writer: Writer) -> None:
    folder = writer.hf(shards=2)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    refused(folder, str(folder / "model.safetensors.index.json"), "damaged")


def test_two_of_a_kind(writer: Writer) -> None:
    folder = writer.hf(shards=2)
    shutil.copy(folder / "model.safetensors.index.json", folder / "copy.json")
    refused(folder, "more than one index", "copy.json")
    folder = writer.hf("configs")
    shutil.copy(folder / "config.json", folder / "copy.json")
    refused(folder, "more than one model configuration", "copy.json")
    folder = writer.hf("doubled")
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    refused(folder, "is both in", "copy.safetensors")
    folder = writer.meta("params")
    shutil.copy(folder / "params.json", folder / "copy.json")
    refused(folder, "more than one params.json", "copy.json")
    folder = writer.llama2c("bins")
    shutil.copy(folder / "model.bin", folder / "copy.bin")
    refused(folder, "several llama2.c checkpoints", "copy.bin")
    folder = writer.gpt_fast("fast")
    shutil.copy(folder / "model.pth", folder / "copy.pth")
    refused(folder, "several gpt-fast checkpoints", "copy.pth")


@pytest.mark.parametrize("form", ["hf", "meta", "gpt-fast"])
def test_missing_tensors(writer: Writer, form: str) -> None:
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        state = {key: tensor for key, tensor in writer.state.items() if key != name}
        folder = getattr(Writer(writer.root, state=state), form.replace("-", "_"))(name)
        refused(folder, f"tensor {name} is missing in", str(folder), "get the checkpoint again")
    state = {key: tensor for key, tensor in writer.state.items() if ".mlp." not in key or ".0." in key}
    folder = Writer(writer.root, state=state).hf("several")
    refused(folder, "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight", "are missing")


def test_a_missing_head_hints_at_tying(writer: Writer) -> None:
    state = {key: tensor for key, tensor in writer.state.items() if key != "lm_head.weight"}
    folder = Writer(writer.root, state=state).hf()
    refused(folder, "tensor lm_head.weight is missing", "if the model's head is its embedding", "config.json")


def test_unexpected_tensors(writer: Writer) -> None:
    folder = writer.hf()
    extra = {f"model.layers.{layer}.self_attn.q_norm.weight": torch.ones(8) for layer in range(5)}
    save_file({**writer.state, **extra}, folder / "model.safetensors")
    shown = ", ".join(f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(3))
    refused(folder, f"tensors {shown} and 2 more in {folder / 'model.safetensors'} are not part of the model", "config.json")


@pytest.mark.parametrize("form", ["hf", "meta", "gpt-fast"])
def test_a_wrong_shape(writer: Writer, form: str) -> None:
    state = {**writer.state, "model.layers.1.mlp.up_proj.weight": torch.ones(40, 32)}
    folder = getattr(Writer(writer.root, state=state), form.replace("-", "_"))()
    refused(folder, "tensor model.layers.1.mlp.up_proj.weight in", "has shape [40, 32]", "asks for [48, 32]")


def test_a_configuration_of_another_model(writer: Writer) -> None:
    folder = writer.gpt_fast()
    change_json(folder / "config.json", num_key_value_heads=1)
    refused(folder, "layers.0.attention.wqkv.weight", "has 64 rows", "another model's")
    folder = writer.meta()
    change_json(folder / "params.json", vocab_size=65)
    refused(folder, str(folder / "params.json"), "vocab_size 65", "64 rows")
    folder = writer.meta("layers")
    change_json(folder / "params.json", n_layers=1)
    refused(folder, "model.layers.1.", "not part of the model")


def test_shards_of_different_meta_checkpoints(writer: Writer) -> None:
    folder = writer.meta(shards=2)
    state = torch.load(folder / "consolidated.01.pth")
    del state["norm.weight"]
    torch.save(state, folder / "consolidated.01.pth")
    refused(folder, "tensor norm.weight is in", "consolidated.01.pth")


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"dim": 33}, "dim 33 and n_heads 4"), ({"norm_eps": None}, "norm_eps is missing"), ({"n_layers": "2"}, "n_layers")],
)
def test_bad_params_json(writer: Writer, changes: dict[str, Any], says: str) -> None:
    folder = writer.meta()
    change_json(folder / "params.json", **changes)
    refused(folder, str(folder / "params.json"), says)


@pytest.mark.parametrize("write", ["meta", "gpt_fast", "hf"])
def test_no_configuration(writer: Writer, write: str) -> None:
    folder = getattr(writer, write)()
    for path in folder.glob("*.json"):
        path.unlink()
    refused(folder, str(folder), "how many heads", ".json")
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, str(folder / "config.json"), "is not valid JSON")


def test_an_unknown_architecture(writer: Writer) -> None:
    folder = writer.hf()
    change_json(folder / "config.json", model_type="mixtral")
    refused(folder, str(folder / "config.json"), "'mixtral' is not supported", "llama")
    save_file({"transformer.wte.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    change_json(folder / "config.json", model_type="gpt2")
    refused(folder, str(folder / "config.json"), "'gpt2' is not supported")


def test_a_checkpoint_that_another_tool_quantized(writer: Writer) -> None:
    folder = writer.hf()
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, str(folder / "config.json"), "was quantized by gptq")
    folder = writer.hf("codes")
    save_file({**writer.state, "lm_head.weight": torch.ones(64, 32, dtype=torch.int8)}, folder / "model.safetensors")
    refused(folder, "tensor lm_head.weight in", "is int8", "quantized by another tool")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("write", ["hf", "meta", "gpt_fast", "llama2c"])
def test_weights_that_are_not_finite(writer: Writer, write: str, value: float) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    writer.state[name][3, 4] = value
    folder = getattr(writer, write)()
    refused(
        folder, f"tensor {name} in {folder}", f"has NaN or infinite values (1 of 512, the first is {value} at [3, 4])", load=True
    )
    assert load_model(open_checkpoint(folder), check_finite=False).config == open_checkpoint(folder).config


def test_a_cast_that_overflows(writer: Writer) -> None:
    writer.state["model.norm.weight"][0] = 1e6
    checkpoint = open_checkpoint(writer.hf())
    with pytest.raises(CheckpointError, match=r"model.norm.weight in .* beyond the range of float16 \(the largest is 1e\+06\)"):
        load_model(checkpoint, dtype=torch.float16)
    with pytest.raises(UsageError, match="int8"):
        load_model(checkpoint, dtype=torch.int8)


def test_a_tied_checkpoint_with_another_head(writer: Writer) -> None:
    folder = writer.tied().hf()
    save_file(writer.state, folder / "model.safetensors")
    refused(folder, "tensor lm_head.weight in", "differs from model.embed_tokens.weight", load=True)


class Attack:
    """Pickled, it calls os.mkdir when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_executed(writer: Writer, tmp_path: Path) -> None:
    folder = writer.gpt_fast()
    mark = tmp_path / "executed"
    torch.save({**torch.load(folder / "model.pth"), "x": Attack(mark)}, folder / "model.pth")
    refused(folder, str(folder / "model.pth"), "mkdir", "executes no pickle")
    assert not mark.exists()
    (folder / "model.pth").write_bytes(pickle.dumps(Attack(mark)))
    refused(folder, str(folder / "model.pth"), "executes no pickle")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Attack(mark)))
    assert mark.exists()  # the attack is real: unpickled, it does what it says


@pytest.mark.parametrize(
    ("value", "says"),
    [([1, 2], "type list"), ({"model": {"a": 1}}, "dictionary of 1 entries under 'model'"), ({}, "dictionary of 0")],
)
def test_a_torch_file_without_named_tensors(writer: Writer, value: object, says: str) -> None:
    folder = writer.gpt_fast()
    torch.save(value, folder / "model.pth")
    refused(folder, str(folder / "model.pth"), says)
