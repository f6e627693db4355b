"""scripts/train_demo_model.py: a short run learns something, writes what can be opened again, and refuses what cannot work."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from typer.testing import CliRunner

from llmq.calibration.corpus import TextSource, resolve_text, text_from_string, token_stream
from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint
from llmq.errors import CheckpointError, OutputError, TextError, UsageError
from llmq.files import sha256_file
from llmq.model.llama import Llama
from llmq.model.tokenizer import load_tokenizer
from llmq.progress import SILENT

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo_model.py"
SAMPLE = Path(__file__).parents[2] / "llmq" / "assets" / "sample"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # dataclasses looks its own module up
    spec.loader.exec_module(module)
    return module


script = _load_script()
TINY = script.Recipe(
    vocab_size=384,
    context=32,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    steps=2,
    batch_size=4,
)
FILES = ["config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these gain nothing from a second thread, and lose much when another process wants the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sample() -> TextSource:
    """The half that models are trained on here."""
    return resolve_text(SAMPLE / "calibration.txt", split="train")


@pytest.mark.slow
def test_short_run_learns_and_opens_again(sample: TextSource, tmp_path: Path) -> None:
    recipe = replace(TINY, context=64, hidden_size=64, intermediate_size=192, steps=25, batch_size=16, learning_rate=1e-2)
    rows_held_out = resolve_text(SAMPLE / "evaluation.txt", split="validation").lines[:60]
    held_out = text_from_string("\n".join(rows_held_out), name="held out", origin="held out")
    out = tmp_path / "model"
    trained = script.run(sample, held_out, out, recipe, force=False, progress=SILENT)

    assert len(trained.training_losses) == recipe.steps
    assert trained.validation_before == pytest.approx(log(recipe.vocab_size), abs=0.1)  # an untrained model knows nothing
    assert trained.validation_after < trained.validation_before - 1
    assert sum(trained.training_losses[-5:]) / 5 < sum(trained.training_losses[:5]) / 5 - 0.7
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    checkpoint = open_checkpoint(out)
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer_for(checkpoint)
    assert checkpoint.config == recipe.config()
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}
    stream = token_stream(tokenizer, script.without_blank_rows(held_out))
    rows = stream[: len(stream) // 65 * 65].view(-1, 65)
    windows = [script.Window(row[:-1], row[1:], 0) for row in rows]
    # the weights were rounded to bf16, by at most one part in 2^9
    assert script.mean_loss(model, windows) == pytest.approx(trained.validation_after, abs=0.02)


@pytest.mark.slow
def test_transformers_opens_it_and_agrees(sample: TextSource, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    script.run(sample, None, tmp_path / "model", TINY, force=False, progress=SILENT)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ours = load_model(open_checkpoint(tmp_path / "model"), dtype=torch.float32)
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert theirs.config.bos_token_id == script.BOS_ID
    assert theirs.config.eos_token_id == script.EOS_ID


def test_same_seed_same_bytes(sample: TextSource, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        script.run(sample, None, tmp_path / name, replace(TINY, seed=seed), force=False, progress=SILENT)
    for file in FILES:
        assert sha256_file(tmp_path / "a" / file) == sha256_file(tmp_path / "b" / file)
    assert sha256_file(tmp_path / "a" / "model.safetensors") != sha256_file(tmp_path / "c" / "model.safetensors")


def test_tokenizer_keeps_every_character(sample: TextSource, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(script.train_tokenizer(sample, TINY))
    tokenizer = load_tokenizer(tmp_path)
    text = " two  spaces ,\ttab @-@ 1 @,@ 024 \n\n naïve 漢字 🙂 ﬁ \n"  # normalisation would undo the ligature
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == TINY.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (script.BOS_ID, script.EOS_ID)
    newline = tokenizer.encode("a\nb")
    assert [tokenizer.decode([token]) for token in newline].count("\n") == 1


def test_articles_have_no_blank_rows() -> None:
    text = text_from_string("\n = One = \n\n a b \n c \n\n\n = Two = \n\n d \n", name="t", origin="t")
    assert script.without_blank_rows(text) == [" = One = \n a b \n c \n", " = Two = \n d \n"]


def test_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = replace(TINY, steps=100, warmup=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)


def test_a_pass_shows_each_token_once_and_the_next_differs() -> None:
    stream = torch.arange(33 * 13 + 5)  # 13 windows: one to spare, three batches of four
    source = script.training_batches(stream, TINY, "numbers")
    first, second = ([next(source) for _ in range(3)] for _ in range(2))
    for batches in (first, second):
        seen = torch.cat(batches)
        assert seen.shape == (12, 33)
        assert len(seen.unique()) == seen.numel()
        assert bool((seen.diff(dim=1) == 1).all())
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_dropout_acts_while_training_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Llama(TINY.config())
    script.initialise(model, TINY.layers)
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        plain = model(tokens)
        with script.with_dropout(model, 0.5):
            assert not torch.equal(model.train()(tokens), plain)
            assert torch.equal(model.eval()(tokens), plain)
        assert torch.equal(model.train()(tokens), plain)


def test_bf16_run_still_writes_a_model(sample: TextSource, tmp_path: Path) -> None:
    trained = script.run(sample, None, tmp_path / "model", replace(TINY, bf16=True), force=False, progress=SILENT)
    assert trained.training_losses[0] == pytest.approx(log(TINY.vocab_size), abs=0.1)
    assert open_checkpoint(tmp_path / "model").config == TINY.config()


@pytest.mark.parametrize(
    ("text", "recipe", "message"),
    [
        ("a few words", TINY, "does not make a tokenizer of 384 pieces .*too high.*another --vocab-size"),
        ("x" * 20000, TINY, "every row is longer than 16384 bytes"),
        ("the quick brown fox " * 8, replace(TINY, vocab_size=280), "windows of 33, but 4 are asked for"),
    ],
)
def test_too_short_text(text: str, recipe: object, message: str, tmp_path: Path) -> None:
    source = text_from_string(text, name="short.txt", origin="short.txt")
    with pytest.raises(TextError, match=message) as caught:
        script.run(source, None, tmp_path / "model", recipe, force=False, progress=SILENT)
    assert "short.txt" in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_validation_text_too_short(sample: TextSource, tmp_path: Path) -> None:
    source = text_from_string("a few words", name="valid.txt", origin="valid.txt")
    with pytest.raises(TextError, match=r"valid\.txt has \d+ tokens"):
        script.run(sample, source, tmp_path / "model", TINY, force=False, progress=SILENT)


def test_existing_output_is_kept(sample: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        script.run(sample, None, out, TINY, force=False, progress=SILENT)
    assert (out / "mine").read_text() == "precious"
    script.run(sample, None, out, TINY, force=True, progress=SILENT)
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_sizes_that_cannot_be(sample: TextSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of --heads, got 32 and 5"):
        script.run(sample, None, tmp_path / "a", replace(TINY, heads=5), force=False, progress=SILENT)
    with pytest.raises(CheckpointError, match="4 and 3"):
        script.run(sample, None, tmp_path / "b", replace(TINY, kv_heads=3), force=False, progress=SILENT)


def test_divergence_is_an_error(sample: TextSource, tmp_path: Path) -> None:
    recipe = replace(TINY, steps=10, learning_rate=1e30, warmup=0.0)
    with pytest.raises(UsageError, match=r"diverged at step .* --learning-rate"):
        script.run(sample, None, tmp_path / "model", recipe, force=False, progress=SILENT)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(script.main)
    small = (
        "--vocab-size 384 --context 32 --hidden-size 32 --intermediate-size 64 --layers 1 --heads 4 --kv-heads 2 --batch-size 4"
    )
    command = [str(SAMPLE / "calibration.txt"), "-o", str(tmp_path / "model"), *small.split(), "--steps", "2", "--threads", "1"]

    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "written:" in done.output
    assert "validation loss" in done.output
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 1

    again = CliRunner().invoke(app, command)
    assert again.exit_code == OutputError.exit_code
    assert "error: output" in again.output
    missing = CliRunner().invoke(app, [str(tmp_path / "none.txt"), "-o", str(tmp_path / "other")])
    assert missing.exit_code == TextError.exit_code
    assert "none.txt" in missing.output
