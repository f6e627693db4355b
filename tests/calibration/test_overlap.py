"""Overlap: exact counts on small texts, and the real splits."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.calibration.corpus import resolve_text
from llmq.calibration.overlap import overlap


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@settings(deadline=None)
@given(st.text("ab c", max_size=60), st.text("ab c", max_size=60), st.integers(1, 4))
def test_counts_are_those_of_sets_of_tuples(calibration: str, evaluation: str, n: int) -> None:
    n_used = max(1, min(n, len(evaluation.split())))
    known = set(ngrams(calibration, n_used))
    expected = [gram in known for gram in ngrams(evaluation, n_used)]
    found = overlap(calibration, evaluation, n_words=n)
    assert (found.shared, found.total) == (sum(expected), len(expected))


def test_case_and_punctuation_do_not_matter() -> None:
    found = overlap("The cat , it sat . On @-@ the MAT", "the cat (it sat) on the mat!", n_words=4)
    assert found.share == 1
    assert found.examples == ("the cat it sat",)
    assert found.warning is not None
    assert "100.0%" in found.warning


def test_disjoint_and_empty_texts() -> None:
    found = overlap("one two three four", "five six seven eight", n_words=2)
    assert (found.share, found.examples, found.warning) == (0.0, (), None)
    assert overlap("words", "").share == 0
    assert overlap("", "words").share == 0


def test_examples_come_from_different_places() -> None:
    shared = [f"passage{i} has five words here" for i in range(5)]
    found = overlap(" x y z ".join(shared), " u v w ".join(shared), n_words=5, examples=3)
    assert found.examples == tuple(shared[:3])


@pytest.mark.slow
def test_real_splits(wikitext: Path) -> None:
    train, test = (resolve_text(wikitext, split=split).raw() for split in ("train", "test"))
    started = time.process_time()
    found = overlap(train, test)
    assert time.process_time() - started < 20
    assert found.total > 200_000
    assert 0 < found.share < 0.001  # stock phrases
    assert found.warning is None
    assert overlap(train + test[: len(test) // 10], test).warning is not None
