"""Texts: which one is taken, what it is called, and the forms the protocols read."""

import time
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch

from llmq.calibration import corpus
from llmq.calibration.corpus import cut_windows, resolve_text, text_from_string, token_stream, token_windows
from llmq.errors import TextError
from llmq.model.tokenizer import load_tokenizer

WIKI_RAW_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(corpus.WIKITEXT_DIR, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(f" \n = {split} tokens = \n \n Words . \n")
    (tmp_path / "wiki.test.raw").write_text(" \n = test raw = \n \n Words . \n")
    return tmp_path


def test_what_is_named_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corpus.WIKITEXT_DIR, str(folder))
    named = folder / "mine.txt"
    named.write_text("My text.\n\nIts end.\n")
    text = resolve_text(named, split="test")
    assert (text.name, text.origin) == ("mine.txt", str(named))
    assert text.raw() == "My text.\n\nIts end.\n"
    assert text.documents() == (text.raw(),)
    assert resolve_text(str(folder), split="validation").name == f"{folder.name}/wiki.valid.tokens"


def test_then_the_folder_with_raw_text_preferred(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corpus.WIKITEXT_DIR, str(folder))
    assert resolve_text(split="test").name == "WikiText-2 test (raw; LLMQ_WIKITEXT_DIR)"
    assert "test raw" in resolve_text(split="test").raw()
    train = resolve_text(split="train")
    assert train.name == "WikiText-2 train (words, rare ones <unk>; LLMQ_WIKITEXT_DIR)"
    assert "train tokens" in train.raw()


def test_then_datasets(no_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(*names: str, split: str) -> datasets.Dataset:
        calls.append((*names, split))
        return datasets.Dataset.from_dict({"text": ["", " = Title = \n", "", " Words . \n"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = resolve_text(split="validation")
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]
    assert text.name == "WikiText-2 validation (raw; datasets)"
    assert text.rows == ("", " = Title = \n", "", " Words . \n")
    assert text.raw() == " \n = Title = \n \n Words . \n"


def test_then_the_bundled_sample_at_once(no_folder: None) -> None:
    assert hub.HF_HUB_OFFLINE
    started = time.monotonic()
    test, train = resolve_text(split="test"), resolve_text(split="train")
    assert time.monotonic() - started < 5  # nearly all of it the first import of datasets
    assert test.name == "bundled sample (evaluation half)"
    assert train.name == "bundled sample (calibration half)"
    assert "HF_HUB_OFFLINE is set" in test.origin
    assert not set(test.documents()) & set(train.documents())
    assert len(test.documents()) > 5


def test_a_hub_that_does_not_answer_costs_seconds(no_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    started = time.monotonic()
    text = resolve_text(split="test")
    assert time.monotonic() - started < corpus.REACH_TIMEOUT_S + 1
    assert text.name.startswith("bundled sample")
    assert "http://127.0.0.1:9 cannot be reached" in text.origin
    assert "HF_HUB_OFFLINE=1" in text.origin


def test_errors_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TextError, match=r"cannot read text .*no.txt: No such file"):
        resolve_text(tmp_path / "no.txt", split="test")
    with pytest.raises(TextError, match=r"holds no train split; one of train.raw.txt"):
        resolve_text(tmp_path, split="train")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(TextError, match="is not UTF-8"):
        resolve_text(tmp_path / "latin.txt", split="test")
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(TextError, match="is empty"):
        resolve_text(tmp_path / "blank.txt", split="test")
    monkeypatch.setenv(corpus.WIKITEXT_DIR, str(tmp_path / "nowhere"))
    with pytest.raises(TextError, match=r"LLMQ_WIKITEXT_DIR folder .*nowhere holds no test split"):
        resolve_text(split="test")


def test_forms_of_a_plain_text() -> None:
    text = text_from_string("One.\r\n\r\nTwo.", name="n", origin="o")
    assert not text.is_wikitext
    assert text.rows == ("One.\n", "", "Two.\n")
    assert text.joined() == "One.\n\n\n\n\nTwo.\n"
    assert text.raw() == "One.\n\nTwo.\n"


def test_forms_of_wikitext() -> None:
    lines = "\n = First = \n\n Words . \n = = Part = = \n\n = x = y = \n\n = Second = \n More . \n"
    text = text_from_string(lines, name="n", origin="o")
    assert text.is_wikitext
    assert text.raw().startswith(" \n = First = \n \n Words . \n")
    assert [page.split("\n")[0] for page in text.documents()] == [" = First = ", " = x = y = ", " = Second = "]
    assert text.documents()[-1] == " = Second = \n More . \n"
    assert text.raw() == " \n" + "\n".join(text.documents())


def test_published_figures_of_wikitext(wikitext: Path) -> None:
    text = resolve_text(wikitext, split="test")
    assert text.sha256 == WIKI_RAW_SHA256
    assert len(text.lines) == 4358
    assert sum(len(row.encode()) + 4 for row in text.rows) == 1_305_088
    assert [len(resolve_text(wikitext, split=split).documents()) for split in ("test", "validation", "train")] == [62, 60, 629]


def test_windows_are_drawn_by_the_seed() -> None:
    stream = torch.arange(1000)
    windows = cut_windows(stream, 20, 30, seed=3, name="t")
    assert torch.equal(windows, cut_windows(stream, 20, 30, seed=3, name="t"))
    assert not torch.equal(windows, cut_windows(stream, 20, 30, seed=4, name="t"))
    assert (windows.diff(dim=1) == 1).all()
    assert len(windows.flatten().unique()) == 600  # none overlap
    assert torch.equal(cut_windows(stream, 2, 30, seed=None, name="t"), torch.arange(60).view(2, 30))
    for seed in range(40):  # any offset leaves enough
        assert cut_windows(torch.arange(95), 3, 31, seed=seed, name="t").shape == (3, 31)
    with pytest.raises(TextError, match="text t has 1000 tokens, 33 windows of 30, but 34 are asked for"):
        cut_windows(stream, 34, 30, seed=0, name="t")
    with pytest.raises(TextError, match="at least one"):
        cut_windows(stream, 0, 30, seed=0, name="t")


def test_token_windows(wt2_8m: Path) -> None:
    tokenizer = load_tokenizer(wt2_8m)
    text = text_from_string(" = A = \n\n some words here . \n = B = \n\n others there . \n", name="n", origin="o")
    stream = token_stream(tokenizer, text.documents())
    assert (stream == tokenizer.bos_id).sum() == 2
    assert stream[0] == tokenizer.bos_id
    windows = token_windows(tokenizer, text, 2, 8, None)
    assert torch.equal(windows.flatten(), stream[:16])
