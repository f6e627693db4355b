"""A model of which one part is in memory: what is opened, what is dropped, and what a keeper stores and brings back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_writers import CONFIG, Writer
from torch import Tensor

from llmq.api.keeping import JobKeeper
from llmq.calibration.sequential import Walk
from llmq.checkpoint import load_model, open_checkpoint
from llmq.checkpoint.job import Job
from llmq.checkpoint.parts import PartwiseModel, part_of
from llmq.errors import CheckpointError, UsageError
from llmq.ops.tensor import QuantizedTensor
from llmq.ranks import Ranks
from llmq.schemes.apply import decide, quantize_
from llmq.schemes.block import EMBEDDING, HEAD
from llmq.schemes.registry import resolve

BLOCKS = ["model.layers.0", "model.layers.1"]


def _meta(model: PartwiseModel) -> set[str]:
    return {name for name, p in model.model.named_parameters(remove_duplicate=False) if p.is_meta}


def test_every_parameter_belongs_to_one_part(writer: Writer) -> None:
    parts = PartwiseModel(open_checkpoint(writer.hf()))
    assert list(parts.parts) == [EMBEDDING, *BLOCKS, HEAD]
    assert parts.parts[EMBEDDING] == ["model.embed_tokens.weight"]
    assert parts.parts[HEAD] == ["model.norm.weight", "lm_head.weight"]
    assert sum(len(names) for names in parts.parts.values()) == len(writer.state)
    assert part_of("model.layers.11.mlp.up_proj.weight") == "model.layers.11"


@pytest.mark.parametrize("kind", ["hf", "hf in shards", "meta", "llama2c"])
def test_an_open_part_is_what_load_model_gives_and_all_else_is_meta(writer: Writer, kind: str) -> None:
    path = {
        "hf": writer.hf,
        "hf in shards": lambda: writer.hf(shards=3),
        "meta": lambda: writer.meta(shards=2),
        "llama2c": lambda: writer.llama2c(version=1),
    }[kind]()
    whole = dict(load_model(open_checkpoint(path), dtype=torch.bfloat16).named_parameters())
    parts = PartwiseModel(open_checkpoint(path), torch.bfloat16)
    everything = _meta(parts)
    assert everything == set(whole)
    for part, names in parts.parts.items():
        parts.open(part)
        assert _meta(parts) == everything - set(names)
        for name in names:
            opened = parts.model.get_parameter(name)
            assert opened.dtype == torch.bfloat16
            assert not opened.requires_grad
            assert torch.equal(opened, whole[name]), name
        parts.drop(part)
        assert _meta(parts) == everything


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_is_cast(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    writer = Writer(tmp_path, dtype=stored)
    parts = PartwiseModel(open_checkpoint(writer.hf()), wanted)
    parts.open(BLOCKS[1])
    expected = wanted or (torch.float32 if stored == torch.float64 else stored)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(parts.model.get_parameter(name), writer.state[name].to(expected))
    assert parts.model.get_parameter(name).dtype == expected


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    with pytest.raises(UsageError, match="float64"):
        PartwiseModel(open_checkpoint(writer.hf("a")), torch.float64)
    writer.state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    parts = PartwiseModel(open_checkpoint(writer.hf("b")))
    parts.open(BLOCKS[0])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        parts.open(BLOCKS[1])
    writer = Writer(tmp_path)
    writer.state["model.norm.weight"][0] = 1e6  # more than fp16 has
    parts = PartwiseModel(open_checkpoint(writer.hf("c")), torch.float16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        parts.open(HEAD)


def test_a_tied_head_opens_with_the_embedding(writer: Writer) -> None:
    tied = writer.tied()
    parts = PartwiseModel(open_checkpoint(tied.hf()))
    assert parts.parts[HEAD] == ["model.norm.weight"]
    parts.open(HEAD)
    assert torch.equal(parts.model.lm_head.weight, tied.state["model.embed_tokens.weight"])
    assert parts.model.model.embed_tokens.weight.is_meta
    parts.drop(HEAD)
    assert "lm_head.weight" in _meta(parts)
    parts.open(EMBEDDING)
    assert torch.equal(parts.model.model.embed_tokens.weight, tied.state["model.embed_tokens.weight"])


def _mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from Linux's /proc")
def test_dropping_a_part_lets_go_of_the_file(writer: Writer) -> None:
    path = writer.hf() / "model.safetensors"
    parts = PartwiseModel(open_checkpoint(path.parent))
    parts.drop(EMBEDDING)
    assert not _mapped(path)
    parts.open(BLOCKS[0])
    assert _mapped(path)  # fp32 as stored: the parameters are the file's pages
    parts.drop(BLOCKS[0])
    assert not _mapped(path)


def _keep(parts: PartwiseModel, out: Path, scheme: str, skip: list[str]) -> JobKeeper:
    """Quantize with a scheme that needs no text, from disk to disk."""
    keeper = JobKeeper(parts, Job(out, {"a": 1}, force=False), ranks=Ranks(), strict=False)
    decisions = decide(parts.model, resolve(scheme, {"group_size": 32}), skip=skip, skip_unfit=True)
    Walk(parts.model, decisions, None, keeper=keeper).run()
    return keeper


WIDE = replace(CONFIG, hidden_size=32, intermediate_size=64)


@pytest.mark.parametrize("head", ["untied, kept", "untied, quantized", "tied, kept", "tied, quantized"])
def test_what_a_keeper_stores_comes_back(tmp_path: Path, head: str) -> None:
    writer = Writer(tmp_path, WIDE, torch.bfloat16)
    writer = writer.tied() if head.startswith("tied") else writer
    skip = ["lm_head"] if head.endswith("kept") else []
    checkpoint = open_checkpoint(writer.hf())
    whole = load_model(checkpoint, dtype=torch.bfloat16)
    quantize_(whole, resolve("int4", {"group_size": 32}), skip=skip, skip_unfit=True, dtype=torch.bfloat16)
    parts = PartwiseModel(open_checkpoint(checkpoint.path), torch.bfloat16)
    keeper = _keep(parts, tmp_path / "out", "int4", skip)
    everything = {name for name, _ in parts.model.named_parameters(remove_duplicate=False)}
    assert _meta(parts) == everything  # nothing stays in memory
    for part in parts.parts:
        assert keeper.finished(part) is not None
        keeper.restore(part)
        names = set(parts.parts[part]) | ({"lm_head.weight"} if part == HEAD and head.startswith("tied") else set())
        assert everything - _meta(parts) == names, part
        for name in names:
            assert _bits(parts.model.get_parameter(name)) == _bits(whole.get_parameter(name)), name
        keeper.leave(part)
    assert keeper.job is not None
    files = keeper.job.folder / "parts"
    stored = {re.sub(r"\.(qdata|scale|zero_point)$", "", name) for part in parts.parts for name in keeper.job.tensors(part)}
    assert ("lm_head.weight" in stored) == (head != "tied, kept")
    entry = keeper.job.entry(HEAD)
    assert entry is not None
    assert ("int" in str(entry["formats"]["lm_head"]["weight"]["kind"])) == head.endswith("quantized")
    assert len(list(files.iterdir())) == 2 * len(parts.parts)
    keeper.job.release()


def _bits(value: Tensor) -> list[bytes]:
    tensors = value.weight.tensors if isinstance(value, QuantizedTensor) else (value.detach(),)
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
