"""Every format gives the same model, whatever its files are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_writers import CONFIG, Writer, interleave
from safetensors.torch import save_file

from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint
from llmq.checkpoint.source import half_split
from llmq.errors import CheckpointError, TokenizerError
from llmq.model.config import RopeScaling

FORMATS: dict[str, tuple[str, Callable[[Writer], Path]]] = {
    "hf": ("hf", lambda w: w.hf()),
    "hf sharded": ("hf", lambda w: w.hf(shards=3)),
    "hf sharded without index": ("hf", lambda w: w.hf(shards=3, index=False)),
    "meta": ("meta", lambda w: w.meta()),
    "meta of two, width cut": ("meta", lambda w: w.meta(shards=2)),
    "meta of two, vocabulary cut": ("meta", lambda w: w.meta(shards=2, vocab_parallel=True)),
    "gpt-fast with config.json": ("gpt-fast", lambda w: w.gpt_fast(config="hf")),
    "gpt-fast with params.json": ("gpt-fast", lambda w: w.gpt_fast(config="params")),
    "llama2.c": ("llama2c", lambda w: w.llama2c()),
    "llama2.c without RoPE tables": ("llama2c", lambda w: w.llama2c(tables=False)),
    "llama2.c version 1": ("llama2c", lambda w: w.llama2c(version=1)),
}


def check_same(writer: Writer, path: Path, form: str) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == form
    model = load_model(checkpoint)
    state = model.state_dict()
    for name, tensor in writer.state.items():
        assert torch.equal(state[name], tensor), name
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].nbytes == tensor.numel() * tensor.element_size()
        assert checkpoint.tensors[name].file in checkpoint.files
    torch.testing.assert_close(writer.logits(model), writer.logits(), rtol=0, atol=1e-6)
    tied = writer.config.tie_word_embeddings
    assert checkpoint.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_format_is_the_same_model(writer: Writer, name: str, tied: bool) -> None:
    form, write = FORMATS[name]
    writer = writer.tied() if tied else writer
    check_same(writer, write(writer), form)


@pytest.mark.parametrize("name", ["hf", "meta", "gpt-fast with config.json", "llama2.c", "llama2.c version 1"])
def test_names_do_not_matter(writer: Writer, name: str) -> None:
    form, write = FORMATS[name]
    folder = write(writer)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"renamed{number}.gguf")
    check_same(writer, folder.rename(folder.with_name("int8-consolidated.pth")), form)


@pytest.mark.parametrize("name", ["hf", "meta", "gpt-fast with params.json", "llama2.c"])
def test_a_file_may_be_named(writer: Writer, name: str) -> None:
    form, write = FORMATS[name]
    folder = write(writer)
    weights = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    check_same(writer, weights, form)
    assert open_checkpoint(weights).folder == folder


def test_meta_may_be_in_safetensors_and_beside_config_json(writer: Writer) -> None:
    folder = writer.folder("mistral")
    save_file(writer.meta_state(), folder / "consolidated.safetensors")
    (folder / "config.json").write_text(json.dumps(writer.config.to_hf()))
    check_same(writer, folder, "meta")


def test_a_pickled_hugging_face_checkpoint_loads(writer: Writer) -> None:
    folder = writer.hf()
    (folder / "model.safetensors").unlink()
    torch.save(writer.state, folder / "pytorch_model.bin")
    torch.save({"arguments": {"lr": Path("x")}}, folder / "training_args.bin")
    check_same(writer, folder, "hf")
    assert any("training_args.bin" in note for note in open_checkpoint(folder).notes)


def test_a_folder_with_several_formats_takes_hugging_face_and_says_so(writer: Writer) -> None:
    folder = writer.hf()
    shutil.copy(writer.gpt_fast() / "model.pth", folder / "model.pth")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    check_same(writer, folder, "hf")
    assert any("model.pth" in note for note in open_checkpoint(folder).notes)
    check_same(writer, folder / "model.pth", "gpt-fast")


def test_gpt_fast_takes_the_original_beside_a_quantized_file(writer: Writer) -> None:
    folder = writer.gpt_fast()
    state = torch.load(folder / "model.pth")
    codes = {name: tensor.to(torch.int8) if tensor.dim() == 2 else tensor for name, tensor in state.items()}
    torch.save(codes, folder / "model_int8.pth")
    check_same(writer, folder, "gpt-fast")
    with pytest.raises(CheckpointError, match=r"model_int8.pth is int8: the checkpoint was quantized by another tool"):
        open_checkpoint(folder / "model_int8.pth")


def test_an_equal_stored_head_of_a_tied_model_is_accepted(writer: Writer) -> None:
    tied = writer.tied()
    folder = tied.hf()
    state = {**tied.state, "lm_head.weight": tied.state["model.embed_tokens.weight"].clone()}
    save_file(state, folder / "model.safetensors")
    check_same(tied, folder, "hf")
    assert "lm_head.weight" not in open_checkpoint(folder).tensors


def test_a_head_that_shares_the_embeddings_storage_is_tied(writer: Writer) -> None:
    tied = writer.tied()
    folder = tied.meta()
    state = torch.load(folder / "consolidated.00.pth")
    state["output.weight"] = state["tok_embeddings.weight"]
    torch.save(state, folder / "consolidated.00.pth")
    check_same(tied, folder, "meta")


def test_rotary_frequencies_that_old_versions_stored_are_ignored(writer: Writer) -> None:
    folder = writer.hf()
    state = {**writer.state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state, folder / "model.safetensors")
    check_same(writer, folder, "hf")


def test_biases_and_head_dim_survive(writer: Writer) -> None:
    config = replace(CONFIG, head_dim=16, attention_bias=True, attention_output_bias=True, mlp_bias=True)
    biased = Writer(writer.root, config)
    check_same(biased, biased.hf(), "hf")


def test_cast(writer: Writer) -> None:
    folder = writer.hf()
    model = load_model(open_checkpoint(folder), dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, writer.state[name].bfloat16()), name
    assert load_model(open_checkpoint(folder)).dtype == torch.float32


def test_the_default_dtype_is_that_of_most_bytes(writer: Writer) -> None:
    folder = writer.hf()
    state = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in writer.state.items()}
    save_file(state, folder / "model.safetensors")
    model = load_model(open_checkpoint(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_opening_reads_no_weights(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "frombuffer", lambda *_, **__: pytest.fail("a weight was read"))
    assert len(open_checkpoint(writer.hf(shards=2)).tensors) == len(writer.state)


def test_the_hash_is_over_the_weights(writer: Writer) -> None:
    folder = writer.hf()
    first = open_checkpoint(folder).sha256
    (folder / "README.md").write_text("nothing to do with weights")
    assert open_checkpoint(folder).sha256 == first
    writer.state["model.norm.weight"][0] += 1
    save_file(writer.state, folder / "model.safetensors")
    assert open_checkpoint(folder).sha256 != first


def test_half_split_undoes_interleaving() -> None:
    weight = torch.randn(24, 5)
    assert torch.equal(half_split(interleave(weight, 3), 3), weight)
    rows = half_split(torch.arange(8.0)[:, None], 1).flatten().tolist()  # one head of 8: even rows first, then odd ones
    assert rows == [0, 2, 4, 6, 1, 3, 5, 7]


def test_params_json_switches_llama31_scaling_on(writer: Writer) -> None:
    folder = writer.meta()
    params = {**writer.params(), "rope_theta": 500000.0, "use_scaled_rope": True}
    del params["max_seq_len"]
    (folder / "params.json").write_text(json.dumps(params))
    checkpoint = open_checkpoint(folder)
    scaling = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    assert checkpoint.config.rope_scaling == scaling
    assert checkpoint.config.max_position_embeddings == 131072
    assert any("context length" in note for note in checkpoint.notes)
    assert any("scaling factor" in note for note in checkpoint.notes)
    (folder / "params.json").write_text(json.dumps({**params, "rope_scaling_factor": 32}))
    assert open_checkpoint(folder).config.rope_scaling == replace(scaling, factor=32.0)


def test_llama2c_tables_tell_the_rope_base(writer: Writer) -> None:
    other = Writer(writer.root, replace(CONFIG, rope_theta=500000.0), state=writer.state)
    assert open_checkpoint(other.llama2c()).config.rope_theta == 500000.0


def test_the_demo_checkpoint(wt2_8m: Path) -> None:
    checkpoint = open_checkpoint(wt2_8m)
    assert (checkpoint.format, checkpoint.dtype, len(checkpoint.tensors)) == ("hf", torch.bfloat16, 75)
    assert load_tokenizer_for(checkpoint).vocab_size == checkpoint.config.vocab_size


def test_a_real_llama2c_checkpoint_tells_its_story(stories260k: Path) -> None:
    checkpoint = open_checkpoint(stories260k)
    model, tokenizer = load_model(checkpoint), load_tokenizer_for(checkpoint)
    ids = tokenizer.encode("Once upon a time", bos=True)
    with torch.no_grad():
        while len(ids) < 40:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids).startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")


class Notes:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_tokenizer_must_fit_the_embedding(writer: Writer, wt2_8m: Path, stories260k: Path) -> None:
    folder = writer.hf()
    with pytest.raises(TokenizerError, match="has no tokenizer beside it"):
        load_tokenizer_for(open_checkpoint(folder))
    shutil.copy(wt2_8m / "tokenizer.model", folder)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer_for(open_checkpoint(folder))
    assert str(folder / "tokenizer.model") in str(caught.value)
    assert "has 4096 tokens" in str(caught.value)
    assert f"checkpoint {folder} has 64 rows" in str(caught.value)
    padded = writer.folder("padded")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(wt2_8m / name, padded)
    shutil.copy(stories260k / "tokenizer.model", padded)
    notes = Notes()
    assert load_tokenizer_for(open_checkpoint(padded), progress=notes).vocab_size == 512
    assert notes.notes == ["tokenizer.model has 512 tokens, the model 4096 rows: the rest is padding"]
