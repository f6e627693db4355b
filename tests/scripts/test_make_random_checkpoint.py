"""scripts/make_random_checkpoint.py: what it writes loads, here and in transformers, and is finite through many layers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_random_checkpoint.py"
SHAPE = ("--vocab-size=4096", "--hidden-size=64", "--intermediate-size=96", "--heads=4", "--kv-heads=2", "--context=32")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The script's main, as a call."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> Done:
        code = module.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return call


def test_shards_load_and_activations_stay_finite(run: Callable[..., Done], tmp_path: Path, wt2_8m: Path) -> None:
    out = tmp_path / "deep"
    done = run(out, *SHAPE, "--layers=12", "--shard-mb=1", "--tokenizer-from", wt2_8m)
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(str(out))
    stored = 2 * 4096 * 64 + 12 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64) + 64
    assert done.stdout == f"{out}: {stored:,} random parameters in bf16\n"
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 1_100_000 for file in files)
    model = load_model(checkpoint)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(torch.arange(32)[None]).float()
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    assert load_tokenizer_for(checkpoint).vocab_size == 4096


@pytest.mark.slow
def test_transformers_reads_it_and_the_same_seed_gives_the_same_bytes(run: Callable[..., Done], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    for out in ("one", "two"):
        done = run(tmp_path / out, *SHAPE, "--layers=2", "--tied", "--dtype=fp32", "--head-dim=8")
        assert done.returncode == 0, done.stderr
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]
    stored = load_file(tmp_path / "one" / "model.safetensors")
    assert "lm_head.weight" not in stored
    tokens = torch.arange(16)[None]
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "one").eval()
    ours = load_model(open_checkpoint(str(tmp_path / "one")))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["head_dim"] == 8


def test_what_cannot_be_written_is_a_sentence(run: Callable[..., Done], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    cases = [
        ((taken, *SHAPE), 6, "exists already"),
        ((tmp_path / "a", *SHAPE, "--heads=5"), 2, "64 cannot be shared among 5 heads"),
        ((tmp_path / "b", *SHAPE, "--shard-mb=0"), 2, "--shard-mb must be at least 1, got 0"),
        ((tmp_path / "c", *SHAPE, "--tokenizer-from", tmp_path), 2, "holds no tokenizer"),
    ]
    for arguments, code, message in cases:
        done = run(*arguments)
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
