"""Mixtures: how sources are named, how windows are shared out, and what a mixed set holds and says."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.calibration.mixture import WeightedSource, largest_mixture, parse_sources, share_out
from llmq.calibration.recorder import CalibrationSet, InputRecorder
from llmq.errors import TextError, UsageError
from llmq.files import sha256_file
from llmq.model.tokenizer import Tokenizer, load_tokenizer

A = "alpha was found in the north of the town ."
B = "the river ran through a valley of grass and stone ."


@pytest.fixture(scope="module")
def tokenizer(wt2_8m: Path) -> Tokenizer:
    return load_tokenizer(wt2_8m)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("\n".join(f"{index} {A}" for index in range(80)))
    rows.write_text("\n".join(json.dumps({"text": f"{index} {B}"}) for index in range(80)))
    return text, rows


def test_sources_are_named_with_weights_or_without(tmp_path: Path) -> None:
    assert parse_sources([]) == (WeightedSource(None, 1.0),)
    assert parse_sources(["a.txt"]) == (WeightedSource("a.txt", 1.0),)
    assert parse_sources(["a.txt=0.7", "hf:org/name:en=3e-1"]) == (
        WeightedSource("a.txt", 0.7),
        WeightedSource("hf:org/name:en", 0.3),
    )
    strange = tmp_path / "x=2"
    strange.write_text("words")
    assert parse_sources([str(strange)]) == (WeightedSource(str(strange), 1.0),)  # it exists under that name
    assert parse_sources([f"{strange}=3"]) == (WeightedSource(str(strange), 3.0),)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a=0"], "weight above 0; got 'a=0'"),
        (["a=-1"], "weight above 0"),
        (["a=nan"], "weight above 0"),
        (["a=inf"], "weight above 0"),
        (["a=b.txt"], "SOURCE=WEIGHT"),
        (["=1"], "SOURCE=WEIGHT"),
        (["  "], "SOURCE=WEIGHT"),
        (["a=1", "b"], "b has no weight"),
        (["a=1", "a=2"], "a is named twice"),
    ],
)
def test_names_that_cannot_be(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_sources(texts)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=7), st.integers(0, 300))
def test_shares_follow_the_quota_and_the_largest_remainders(weights: list[float], total: int) -> None:
    shares = share_out(weights, total)
    assert sum(shares) == total
    quotas = [total * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))
    up = [quota % 1 for share, quota in zip(shares, quotas, strict=True) if share > quota]
    down = [quota % 1 for share, quota in zip(shares, quotas, strict=True) if share <= quota]
    assert not up or not down or min(up) >= max(down)  # nobody was rounded up before a larger remainder


def test_shares_by_hand() -> None:
    assert share_out([0.7, 0.3], 10) == [7, 3]
    assert share_out([1, 1, 1], 10) == [4, 3, 3]
    assert share_out([47, 16, 15.8, 12, 6.1, 3.1], 10) == [5, 2, 1, 1, 1, 0]
    assert share_out([1e-9, 1], 128) == [0, 128]


def test_the_largest_mixture_that_every_source_has() -> None:
    assert largest_mixture([1, 1], [3, 100], 128) == [3, 3]
    assert largest_mixture([3, 1], [100, 2], 128) == [8, 2]  # of 10; 11 would take three of the second
    assert largest_mixture([1.0], [40], 128) == [40]
    assert largest_mixture([1.0], [400], 128) == [128]
    assert largest_mixture([1, 1], [5, 0], 128) is None


def test_windows_come_from_every_source_and_are_mixed(tokenizer: Tokenizer, files: tuple[Path, Path], tmp_path: Path) -> None:
    text, rows = files
    sources = parse_sources([f"{text}=0.7", f"{rows}=0.3"])
    recorder = InputRecorder(tokenizer, windows=20, length=16, seed=3)
    mixed = recorder.record_sources(sources)
    assert mixed.tokens.shape == (20, 16)
    windows = [tokenizer.decode(window) for window in mixed.tokens.tolist()]
    of_text = ["found" in window or "alpha" in window or "north" in window for window in windows]
    assert sum(of_text) == 14
    assert sorted(of_text) != of_text  # they are not one source after the other
    assert sorted(of_text, reverse=True) != of_text
    # each part gives what it gives alone
    alone = torch.cat(
        [
            InputRecorder(tokenizer, windows=14, length=16, seed=3).record_text(text).tokens,
            InputRecorder(tokenizer, windows=6, length=16, seed=3).record_dataset(rows).tokens,
        ]
    )
    assert sorted(mixed.tokens.tolist()) == sorted(alone.tolist())
    assert torch.equal(mixed.tokens, recorder.record_sources(sources).tokens)
    other = InputRecorder(tokenizer, windows=20, length=16, seed=4).record_sources(sources)
    assert not torch.equal(mixed.tokens, other.tokens)
    mixed.save(tmp_path / "set")
    read = CalibrationSet.load(tmp_path / "set", tokenizer=tokenizer)
    assert read.info == mixed.info
    assert torch.equal(read.tokens, mixed.tokens)


def test_every_part_is_recorded_with_its_hash(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    text, rows = files
    info = InputRecorder(tokenizer, windows=20, length=16).record_sources(parse_sources([f"{text}=0.7", f"{rows}=0.3"])).info
    assert (info.kind, info.source) == ("mixture", "14/20 a.txt + 6/20 b.jsonl")
    first, second = info.parts
    assert (first.name, first.kind, first.weight, first.windows) == ("a.txt", "text", 0.7, 14)
    assert (second.name, second.kind, second.weight, second.windows) == ("b.jsonl", "dataset", 0.3, 6)
    assert (first.sha256, second.sha256) == (sha256_file(text), sha256_file(rows))
    assert first.tokens_seen + second.tokens_seen == info.tokens_seen
    assert json.loads(json.dumps(info.to_json()))["parts"][1]["template_sha256"] is None
    rows.write_text(rows.read_text().replace("river", "brook"))
    changed = InputRecorder(tokenizer, windows=20, length=16).record_sources(parse_sources([f"{text}=0.7", f"{rows}=0.3"])).info
    assert changed.source_sha256 != info.source_sha256
    other_weights = InputRecorder(tokenizer, windows=20, length=16).record_sources(parse_sources([f"{text}=1", f"{rows}=1"])).info
    assert other_weights.source_sha256 != changed.source_sha256


def test_without_a_number_there_are_as_many_windows_as_the_shares_allow(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    text, rows = files
    available = [
        InputRecorder(tokenizer, windows=None, length=64).record_sources(parse_sources([str(path)])).info.windows
        for path in files
    ]
    assert all(5 < count < 128 for count in available)
    even = InputRecorder(tokenizer, windows=None, length=64).record_sources(parse_sources([str(text), str(rows)])).info
    assert even.windows == 2 * min(available) + (available[0] > available[1])  # the first gets the odd one
    assert [part.windows for part in even.parts] == share_out([1, 1], even.windows)


def test_sources_that_cannot_give_their_share(tokenizer: Tokenizer, files: tuple[Path, Path], tmp_path: Path) -> None:
    text, rows = files
    recorder = InputRecorder(tokenizer, windows=8, length=16)
    with pytest.raises(UsageError, match=r"b\.jsonl would give none of 8 windows"):
        recorder.record_sources(parse_sources([f"{text}=1", f"{rows}=0.001"]))
    with pytest.raises(TextError, match="does not exist; name a file or folder, or a dataset of the hub as hf:NAME"):
        recorder.record_sources(parse_sources([str(text), str(tmp_path / "nowhere")]))
    short = tmp_path / "short.txt"
    short.write_text("two words")
    for windows in (8, None):
        with pytest.raises(TextError, match=r"text short\.txt has \d+ tokens, 0 windows of 16"):
            InputRecorder(tokenizer, windows=windows, length=16).record_sources(parse_sources([str(text), str(short)]))
    with pytest.raises(TextError, match=r"dataset org/name cannot be loaded"):
        recorder.record_sources(parse_sources(["hf:org/name:en"]))  # the tests are offline


def test_rows_are_told_from_texts_by_their_content(tokenizer: Tokenizer, files: tuple[Path, Path], tmp_path: Path) -> None:
    import datasets

    _, rows = files
    unnamed = tmp_path / "rows.data"
    unnamed.write_text(rows.read_text())
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([json.loads(line) for line in rows.read_text().splitlines()]))
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"text": f"{index} {B}"} for index in range(80)]).save_to_disk(folder)
    recorder = InputRecorder(tokenizer, windows=6, length=16)
    sets = [recorder.record_sources([WeightedSource(str(path))]) for path in (rows, unnamed, listed, folder)]
    assert {each.info.kind for each in sets} == {"dataset"}
    for other in sets[1:]:
        assert torch.equal(other.tokens, sets[0].tokens)
    bracketed = tmp_path / "verse.txt"
    bracketed.write_text("\n".join(["[1] in the beginning", "{ not json", *[A] * 30]))
    assert recorder.record_sources([WeightedSource(str(bracketed))]).info.kind == "text"
