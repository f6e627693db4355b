"""What is bundled is whole: the sample's size, layout and independence of its halves, and the demo checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

ASSETS = Path(__file__).parent.parent / "llmq" / "assets"
HALVES = ("calibration", "evaluation")
OVERLAP_WORDS = 13
ASCII_AND_MORE = re.compile(r"[\n\x20-\x7eÀ-ɏ–£°]*")


def _text(half: str) -> str:
    return (ASSETS / "sample" / f"{half}.txt").read_bytes().decode("utf-8", errors="strict")


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + OVERLAP_WORDS]) for start in range(len(words) - OVERLAP_WORDS + 1)}


def _titles(text: str) -> list[str]:
    return re.findall(r"^ = ([^=\n]+) = $", text, flags=re.MULTILINE)


def test_sample_is_large_enough_and_evenly_split() -> None:
    sizes = {half: len(_text(half).encode()) for half in HALVES}
    assert sum(sizes.values()) >= 64 * 1024
    assert min(sizes.values()) >= 0.45 * sum(sizes.values())


@pytest.mark.parametrize("half", HALVES)
def test_sample_has_the_layout_of_wikitext(half: str) -> None:
    text = _text(half)
    assert text.endswith(" \n\n")
    assert "\r" not in text
    assert ASCII_AND_MORE.fullmatch(text)
    rows = text.split("\n")
    assert rows[0] == ""
    for previous, row, following in zip(rows, rows[1:], rows[2:], strict=False):
        if not row:
            continue
        assert row[0] == row[-1] == " ", row
        assert "  " not in row, row
        if row.startswith(" ="):
            level = re.fullmatch(r" (=(?: =)*) [^=]+ \1 ", row)
            assert level, row
            assert previous == following == "", row
        else:
            assert row.endswith((" . ", ' " ')), row
            # punctuation that a tokenizer of WikiText never saw inside a word
            assert not re.search(r"\w[,;:!?()\"]|[(\"]\w|\d[.]\d|\w-\w", row), row
    assert len(_titles(text)) >= 12
    assert re.search(r" @-@ ", text)
    assert re.search(r"\d @,@ \d{3}\b", text)
    assert re.search(r"\d @\.@ \d", text)


@pytest.mark.parametrize("half", HALVES)
def test_articles_are_of_a_size(half: str) -> None:
    articles = re.split(r"^ = [^=\n]+ = $", _text(half), flags=re.MULTILINE)[1:]
    assert all(1800 < len(article) < 4500 for article in articles), [len(article) for article in articles]
    assert all(" = = " in article for article in articles)


def test_halves_have_nothing_in_common() -> None:
    calibration, evaluation = (_text(half) for half in HALVES)
    assert len(_shingles(calibration)) > 5000
    assert not _shingles(calibration) & _shingles(evaluation)
    titles = _titles(calibration) + _titles(evaluation)
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("half", HALVES)
def test_no_passage_is_repeated(half: str) -> None:
    words = _text(half).split()
    runs = [tuple(words[start : start + OVERLAP_WORDS]) for start in range(len(words) - OVERLAP_WORDS + 1)]
    assert len(set(runs)) == len(runs)


@pytest.mark.slow
@pytest.mark.wikitext
def test_sample_is_not_wikitext(wikitext: Path) -> None:
    ours = _shingles(_text("calibration")) | _shingles(_text("evaluation"))
    for path in sorted(wikitext.glob("*.txt")):
        assert not ours & _shingles(path.read_text(encoding="utf-8")), path.name


def test_readers_see_the_articles() -> None:
    from llmq.calibration.corpus import resolve_text

    for half in HALVES:
        source = resolve_text(ASSETS / "sample" / f"{half}.txt", split="test")
        assert source.is_wikitext
        assert len(source.documents()) == len(_titles(_text(half)))


def test_demo_checkpoint_is_what_the_readme_says(wt2_8m: Path) -> None:
    from safetensors import safe_open

    config = json.loads((wt2_8m / "config.json").read_text())
    with safe_open(wt2_8m / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no dict
    elements = sum(tensor.numel() for tensor in tensors.values())
    assert f"{elements:,} parameters" in (ASSETS / "README.md").read_text(encoding="utf-8")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert (wt2_8m / "tokenizer.model").is_file()


@pytest.mark.slow
def test_demo_model_knows_more_than_chance_of_both_halves(wt2_8m: Path) -> None:
    """The sample is text of the kind that the model was trained on: its perplexity there is that on WikiText, about 60."""
    from llmq.calibration.corpus import resolve_text, token_windows
    from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint

    checkpoint = open_checkpoint(wt2_8m)
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer_for(checkpoint)
    for half in HALVES:
        source = resolve_text(ASSETS / "sample" / f"{half}.txt", split="test")
        tokens = token_windows(tokenizer, source, 8, 256, seed=0)
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert 30 < float(loss.exp()) < 120
