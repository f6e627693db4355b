"""Float8 on disk: bit for bit what it was, counted as it is stored, and refused where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_writers import Writer
from safetensors.torch import load_file, save_file

from llmq.api.sizes import size_of
from llmq.benchmark.traffic import traffic_of_config, traffic_of_model
from llmq.checkpoint import Checkpoint, Manifest, describe, load_model, open_checkpoint, save_model, verify
from llmq.errors import CheckpointError
from llmq.model.llama import Llama
from llmq.numerics.weight import same_bits
from llmq.ops.select import prepare
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import quantize_
from llmq.schemes.registry import resolve

WEIGHT = "model.layers.0.mlp.up_proj.weight"
MANIFEST = Manifest(scheme="float8-dynamic", source={"name": "hf", "sha256": "0" * 64})


@pytest.fixture
def source(writer: Writer) -> Checkpoint:
    return open_checkpoint(writer.hf("source"))


@pytest.fixture
def model(source: Checkpoint) -> Llama:
    model = load_model(source, dtype=torch.bfloat16)
    overrides = {"model.layers.0.mlp.down_proj": resolve("float8-weight-only"), "lm_head": resolve("float8-dynamic")}
    overrides["model.layers.1.mlp.down_proj"] = resolve("float8-dynamic", {"granularity": "tensor"})
    quantize_(model, "float8-dynamic", overrides=overrides)
    return model


@pytest.fixture
def out(source: Checkpoint, model: Llama, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    return tmp_path / "out"


def test_round_trip_is_bit_exact(writer: Writer, model: Llama, out: Path) -> None:
    opened = open_checkpoint(out)
    verify(opened)
    loaded = load_model(opened)
    mine, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    quantized = [name for name, parameter in mine.items() if isinstance(parameter, QuantizedTensor)]
    assert len(quantized) == 7 * model.config.num_layers + 1
    for name in quantized:
        one, two = mine[name], theirs[name]
        assert isinstance(one, QuantizedTensor)
        assert isinstance(two, QuantizedTensor)
        assert one.format == two.format
        assert all(same_bits(a, b) for a, b in zip(one.weight.tensors, two.weight.tensors, strict=True))
    assert torch.equal(writer.logits(model), writer.logits(loaded))
    tensors = load_file(out / "model.safetensors")
    assert tensors[f"{WEIGHT}.qdata"].dtype == torch.float8_e4m3fn
    assert tensors[f"{WEIGHT}.scale"].dtype == torch.float32
    assert f"{WEIGHT}.zero_point" not in tensors
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {"quant_method": "llmq"}


def test_counts_what_is_stored(model: Llama, out: Path) -> None:
    opened = open_checkpoint(out)
    facts, size = describe(opened), size_of(model)
    assert facts.matrix_bits_per_weight == size.matrix_bits_per_weight
    linears = [parameter for parameter in facts.parameters if parameter.format is not None]
    stored = sum(parameter.elements + 4 * parameter.shape[0] for parameter in linears)
    stored -= 2 * linears[[parameter.name for parameter in linears].index("model.layers.0.mlp.down_proj.weight")].shape[0]
    assert sum(parameter.nbytes for parameter in linears) == stored
    prepare(model)
    assert opened.manifest is not None
    counted = traffic_of_config(opened.config, opened.manifest.linear_formats(), torch.bfloat16)
    assert counted.linears_nbytes == traffic_of_model(model).linears_nbytes == stored


def test_a_code_that_is_no_number_is_found(out: Path) -> None:
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{WEIGHT}.qdata"].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight.qdata in .* has NaN or infinite values \(1 of .* at \[3, 5\]\)"):
        load_model(open_checkpoint(out))
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        verify(open_checkpoint(out))


def test_other_tensors_than_the_manifest_describes_are_refused(out: Path) -> None:
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{WEIGHT}.qdata"] = tensors[f"{WEIGHT}.qdata"].view(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"qdata must be torch.float8_e4m3fn, got torch.int8"):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": {"kind": "float4"}}, "a grid is of kind int, float8 or float, got 'float4'"),
        ({"activation": {"symmetric": True, "eps": 1e-5, "static": False}}, "only go with each other"),
        ({"activation": {"kind": "float8", "granularity": "block"}}, "one scale a 'row' or a 'tensor', got 'block'"),
    ],
)
def test_formats_that_cannot_be_are_refused(out: Path, change: dict[str, object], words: str) -> None:
    path = out / "llmq.json"
    data = json.loads(path.read_text())
    data["formats"][WEIGHT.removesuffix(".weight")] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(out)
