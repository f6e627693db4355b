"""The artefact: what is saved is what is loaded, bit by bit, and nothing else is accepted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writers import CONFIG, Writer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from llmq.checkpoint import Checkpoint, Manifest, describe, load_model, open_checkpoint, save_model, verify
from llmq.checkpoint import store as store_module
from llmq.errors import CheckpointError, OutputError, UsageError
from llmq.model.llama import Llama
from llmq.numerics.grid import ActivationGrid, FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, torch_dtype
from llmq.ops.tensor import QuantizedTensor

FORMATS = {
    "q_proj": LinearFormat(IntGrid(4, 16, symmetric=False, zero_point="float", scale_dtype="bfloat16")),
    "k_proj": LinearFormat(IntGrid(3, 8, symmetric=False, zero_point="int")),
    "v_proj": LinearFormat(IntGrid(8), ActivationGrid()),
    "o_proj": LinearFormat(FloatGrid("float32")),
    "gate_proj": LinearFormat(IntGrid(4, 32, scale_dtype="float16"), ActivationGrid(symmetric=False)),
    "up_proj": LinearFormat(IntGrid(5)),
    "down_proj": LinearFormat(IntGrid(8, 16), ActivationGrid(static=True)),
}
MANIFEST = Manifest(
    scheme="int4",
    options={"group_size": 16},
    source={"name": "hf", "sha256": "0" * 64},
    calibration={"windows": 4},
    seed=3,
    threads=2,
    versions={"torch": "2"},
    skipped={"lm_head": "skipped by default"},
    layers=[{"fqn": "model.layers.0.self_attn.q_proj", "sqnr_db": 20.5}],
)


def quantized(weight: torch.Tensor, form: LinearFormat) -> QuantizedTensor:
    """A weight on the format's grid; the codes are random, what they mean is not asked here."""
    n, k = weight.shape
    grid = form.weight
    if isinstance(grid, FloatGrid):
        return QuantizedTensor.from_weight(QuantizedWeight.from_float(weight.detach()), form, weight.dtype)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (n, k)).to(torch.int8 if grid.symmetric else torch.uint8)
    entries = (n, grid.groups(k))
    scale = (0.01 + 0.02 * torch.rand(entries)).to(torch_dtype(grid.scale_dtype))
    zero = None
    if grid.zero_point == "int":
        zero = torch.randint(0, grid.qmax + 1, entries).to(torch.uint8)
    elif grid.zero_point == "float":
        zero = (0.1 * torch.randn(entries)).to(scale.dtype)
    stored = QuantizedWeight.from_codes(grid, codes, scale, zero)
    if form.has_input_scale:
        stored = replace(stored, input_scale=torch.rand(1) + 0.01)
    return QuantizedTensor.from_weight(stored, form, weight.dtype)


def quantize(model: Llama, formats: dict[str, LinearFormat]) -> Llama:
    torch.manual_seed(11)
    for fqn, module in model.named_modules():
        form = formats.get(fqn.rpartition(".")[2])
        if form is not None and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(quantized(module.weight, form), requires_grad=False)
    return model


@pytest.fixture
def source(writer: Writer) -> Checkpoint:
    return open_checkpoint(writer.hf("source"))


@pytest.fixture
def model(source: Checkpoint) -> Llama:
    return quantize(load_model(source), FORMATS)


def same_tensors(a: Llama, b: Llama) -> None:
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    assert first.keys() == second.keys()
    for name, one in first.items():
        two = second[name]
        assert type(one) is type(two)
        if not isinstance(one, QuantizedTensor):
            assert torch.equal(one, two)
            continue
        assert isinstance(two, QuantizedTensor)
        assert one.format == two.format
        for x, y in zip(one.weight.tensors, two.weight.tensors, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def test_round_trip_is_bit_exact(writer: Writer, source: Checkpoint, model: Llama, tmp_path: Path) -> None:
    out = tmp_path / "out"
    saved = save_model(model, out, manifest=MANIFEST, source=source)
    assert saved.format == "llmq"
    opened = open_checkpoint(out)
    assert opened.manifest is not None
    loaded = load_model(opened)
    same_tensors(model, loaded)
    assert torch.equal(writer.logits(model), writer.logits(loaded))
    assert opened.config == source.config
    filled_in = {"dtype", "formats", "weights"}
    assert opened.manifest.model_dump(exclude=filled_in) == MANIFEST.model_dump(exclude=filled_in)
    expected = {fqn: FORMATS[fqn.rpartition(".")[2]] for fqn in opened.manifest.formats}
    assert opened.manifest.linear_formats() == expected
    assert len(expected) == 7 * CONFIG.num_layers
    verify(opened)


def test_the_files_are_plain_safetensors(source: Checkpoint, model: Llama, tmp_path: Path) -> None:
    save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {
        name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items() if "layers.0.self_attn.k_proj" in name
    } == {
        "model.layers.0.self_attn.k_proj.weight.qdata": (torch.uint8, [16, 12]),
        "model.layers.0.self_attn.k_proj.weight.scale": (torch.float32, [16, 4]),
        "model.layers.0.self_attn.k_proj.weight.zero_point": (torch.uint8, [16, 4]),
    }
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_model_makes_the_same_bytes(source: Checkpoint, model: Llama, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_model(model, tmp_path / name, manifest=MANIFEST, source=source)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert {"config.json", "llmq.json", "model.safetensors"} == one.keys()


def test_shards(source: Checkpoint, model: Llama, tmp_path: Path) -> None:
    saved = save_model(model, tmp_path / "out", manifest=MANIFEST, source=source, max_shard_bytes=10_000)
    assert len(saved.files) > 3
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 10_000 for path in saved.files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == saved.tensors.keys()
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in saved.tensors.values())
    same_tensors(model, load_model(open_checkpoint(tmp_path / "out")))


def test_tied_embeddings_stay_tied(writer: Writer, tmp_path: Path) -> None:
    tied = writer.tied()
    source = open_checkpoint(tied.hf("source"))
    for name, formats in (("plain", FORMATS), ("wrapped", {**FORMATS, "lm_head": LinearFormat(FloatGrid("float32"))})):
        model = quantize(load_model(source), formats)
        saved = save_model(model, tmp_path / name, manifest=MANIFEST, source=source)
        assert saved.config.tie_word_embeddings
        assert not any(stored.startswith("lm_head") for stored in saved.tensors)
        loaded = load_model(open_checkpoint(tmp_path / name))
        head = loaded.lm_head.weight
        memory = head.weight.qdata if isinstance(head, QuantizedTensor) else head
        assert isinstance(head, QuantizedTensor) == (name == "wrapped")
        assert memory.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
        assert torch.equal(writer.logits(model), writer.logits(loaded))


def test_a_quantized_head_is_no_longer_tied(writer: Writer, tmp_path: Path) -> None:
    source = open_checkpoint(writer.tied().hf("source"))
    model = quantize(load_model(source), {**FORMATS, "lm_head": LinearFormat(IntGrid(8))})
    saved = save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    assert not saved.config.tie_word_embeddings
    loaded = load_model(open_checkpoint(tmp_path / "out"))
    assert torch.equal(writer.logits(model), writer.logits(loaded))


def test_biases_are_kept(tmp_path: Path) -> None:
    config = replace(CONFIG, attention_bias=True, attention_output_bias=True, mlp_bias=True)
    writer = Writer(tmp_path, config)
    source = open_checkpoint(writer.hf("source"))
    model = quantize(load_model(source), FORMATS)
    save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    loaded = load_model(open_checkpoint(tmp_path / "out"))
    same_tensors(model, loaded)
    assert torch.equal(writer.logits(model), writer.logits(loaded))


def test_an_artefact_in_another_dtype(source: Checkpoint, model: Llama, tmp_path: Path) -> None:
    save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    loaded = load_model(open_checkpoint(tmp_path / "out"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    weight = loaded.model.layers[0].self_attn.o_proj.weight
    assert isinstance(weight, QuantizedTensor)
    assert weight.format == LinearFormat(FloatGrid("bfloat16"))
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]]))).all()


def test_a_format_in_another_dtype_than_the_model(source: Checkpoint, tmp_path: Path) -> None:
    save_model(load_model(source), tmp_path / "out", manifest=MANIFEST, source=source)
    edit(tmp_path / "out" / "llmq.json", formats={"lm_head": LinearFormat(FloatGrid("float16")).to_json()})
    with pytest.raises(CheckpointError, match=r"llmq.json has lm_head.weight in FloatGrid\(dtype='float16'\), and the model in"):
        open_checkpoint(tmp_path / "out")


def test_one_dtype(source: Checkpoint, model: Llama, tmp_path: Path) -> None:
    model.model.norm.half()
    with pytest.raises(UsageError, match=r"model.norm.weight is torch.float16, the model torch.float32"):
        save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_travels(wt2_8m: Path, tmp_path: Path) -> None:
    source = open_checkpoint(wt2_8m)
    save_model(load_model(source), tmp_path / "out", manifest=MANIFEST, source=source)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (wt2_8m / name).read_bytes()


def test_it_does_not_overwrite_unless_told(source: Checkpoint, model: Llama, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        save_model(model, out, manifest=MANIFEST, source=source)
    assert (out / "mine.txt").read_text() == "precious"
    save_model(model, out, manifest=MANIFEST, source=source, force=True)
    assert not (out / "mine.txt").exists()


def test_a_write_that_reads_back_differently_leaves_nothing(
    source: Checkpoint, model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = store_module.write_safetensors

    def flip_a_bit(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        honest(path, tensors)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(store_module, "write_safetensors", flip_a_bit)
    with pytest.raises(OutputError, match=r"tensor .* reads back differently"):
        save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def artefact(source: Checkpoint, model: Llama, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "out", manifest=MANIFEST, source=source)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema_version": 3}, "has schema version 3, this llmq reads up to 2; update llmq"),
        ({"scheme": None}, "scheme: "),
        ({"surprise": 1}, "surprise: "),
        ({"formats": {"lm_head": {"weight": {"kind": "int", "bits": 9}, "activation": None}}}, "bits must be from 2 to 8"),
        ({"formats": {"lm_head": {}}}, "formats: "),
        ({"formats": {"head": LinearFormat(FloatGrid("float16")).to_json()}}, "gives a format to head.weight, which the model"),
        ({"weights": {}}, "weights is missing"),
        ({"dtype": None}, "dtype is missing"),
        ({"weights": {"../model.safetensors": {"sha256": "", "nbytes": 1}}}, "is missing in"),
        ({"formats": {}}, "tensor model.layers.0.self_attn.q_proj.weight is missing"),
    ],
)
def test_a_manifest_that_cannot_be(artefact: Path, changes: dict[str, Any], says: str) -> None:
    edit(artefact / "llmq.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(artefact)
    assert says in str(caught.value)
    assert str(artefact / "llmq.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.norm.weight", None, "tensor model.norm.weight is missing"),
        ("extra", torch.ones(1), "tensor extra in"),
        ("model.norm.weight", torch.ones(33), "[33]"),
        ("model.norm.weight", torch.ones(32).half(), "torch.float16"),
        ("model.layers.0.self_attn.v_proj.weight.qdata", torch.zeros(16, 31, dtype=torch.int8), "must have shape [16, 32]"),
        ("model.layers.0.self_attn.v_proj.weight.scale", torch.ones(16, 1).half(), "scale must be torch.float32"),
        ("model.layers.0.self_attn.k_proj.weight.zero_point", None, "zero_point is missing"),
        ("model.layers.0.mlp.down_proj.weight.input_scale", None, "input_scale is missing"),
        ("model.layers.0.mlp.down_proj.weight.input_scale", torch.ones(2), "input scale must have shape [1]"),
        ("model.layers.0.self_attn.v_proj.weight.input_scale", torch.ones(1), "input_scale in"),
    ],
)
def test_tensors_that_the_manifest_does_not_describe(artefact: Path, name: str, value: torch.Tensor | None, says: str) -> None:
    tensors = {**load_file(artefact / "model.safetensors"), name: value}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, artefact / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(artefact)
    assert says in str(caught.value)
    assert str(artefact / "llmq.json") in str(caught.value)


def test_scales_that_are_not_finite(artefact: Path) -> None:
    tensors = load_file(artefact / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.scale"
    tensors[name][2] = float("nan")
    save_file(tensors, artefact / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name} in .* NaN or infinite"):
        load_model(open_checkpoint(artefact))


def test_verify_sees_a_changed_byte(artefact: Path, source: Checkpoint) -> None:
    verify(source)
    raw = bytearray((artefact / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (artefact / "model.safetensors").write_bytes(raw)
    checkpoint = open_checkpoint(artefact)  # a header is not enough to see it
    with pytest.raises(CheckpointError, match=r"model.safetensors was changed or damaged: its SHA-256 is"):
        verify(checkpoint)


def test_verify_reads_every_weight(writer: Writer) -> None:
    writer.state["model.layers.0.input_layernorm.weight"][5] = float("inf")
    checkpoint = open_checkpoint(writer.hf("bad"))
    with pytest.raises(CheckpointError, match=r"model.layers.0.input_layernorm.weight in .* at \[5\]"):
        verify(checkpoint)


def test_incomplete_artefacts(artefact: Path) -> None:
    (artefact / "config.json").rename(artefact.parent / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(artefact)
    (artefact.parent / "config.json").rename(artefact / "config.json")
    shutil.copy(artefact / "llmq.json", artefact / "copy.json")
    with pytest.raises(CheckpointError, match="more than one manifest"):
        open_checkpoint(artefact)
    (artefact / "copy.json").unlink()
    with pytest.raises(CheckpointError, match="name its folder"):
        open_checkpoint(artefact / "model.safetensors")
    (artefact / "llmq.json").unlink()
    with pytest.raises(CheckpointError, match="must hold the manifest too"):
        open_checkpoint(artefact)


def test_description_of_an_artefact(artefact: Path) -> None:
    description = describe(open_checkpoint(artefact))
    assert description.artefact is not None
    assert description.artefact.scheme == "int4"
    rows = {row.name: row for row in description.parameters}
    four = rows["model.layers.0.self_attn.q_proj.weight"]
    assert four.format == FORMATS["q_proj"]
    assert four.bits_per_weight == 4 + 2 * 16 / 16  # bf16 scale and bf16 zero point for 16 weights
    assert rows["model.layers.0.self_attn.v_proj.weight"].bits_per_weight == 8 + 32 / 32
    down = rows["model.layers.0.mlp.down_proj.weight"]
    assert down.nbytes == FORMATS["down_proj"].nbytes(32, 48) == 32 * 48 + 32 * 3 * 4 + 4
    assert rows["model.norm.weight"].format is None
    assert description.stored_bytes == sum(info.nbytes for info in open_checkpoint(artefact).tensors.values())
    integers = [row for row in rows.values() if row.format and isinstance(row.format.weight, IntGrid)]
    expected = 8 * sum(row.nbytes for row in integers) / sum(row.elements for row in integers)
    assert description.matrix_bits_per_weight == pytest.approx(expected)
    assert description.file_bits_per_weight == pytest.approx(8 * description.stored_bytes / description.total_parameters)
    json.dumps(description.to_json())


@pytest.mark.parametrize("tied", [False, True])
def test_description_of_an_original(writer: Writer, tied: bool, wt2_8m: Path) -> None:
    writer = writer.tied() if tied else writer
    description = describe(open_checkpoint(writer.hf("plain")))
    assert description.counts == {
        "embedding": 64 * 32,
        "attention": 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32),
        "mlp": 2 * 3 * 48 * 32,
        "norm": 5 * 32,
        **({} if tied else {"head": 64 * 32}),
    }
    assert description.total_parameters == sum(tensor.numel() for tensor in writer.state.values())
    assert description.file_bits_per_weight == description.matrix_bits_per_weight == 32
    assert [(facts.dtype, facts.tensors) for facts in description.dtypes] == [("float32", len(writer.state))]
    assert description.artefact is None
    assert description.tokenizer is None
    assert "has no tokenizer beside it" in (description.tokenizer_problem or "")
    demo = describe(open_checkpoint(wt2_8m))
    assert demo.tokenizer is not None
    assert (demo.tokenizer.kind, demo.tokenizer.vocab_size, demo.tokenizer.bos_id) == ("sentencepiece", 4096, 1)
