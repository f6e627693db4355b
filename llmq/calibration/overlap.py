"""Do two texts share passages? A scheme that was calibrated on what it is evaluated on looks better than it is.

Texts are compared by their n-grams of words, 13 words long as in Brown et al. (arXiv:2005.14165, appendix C), after lower
case and without punctuation. N-grams are compared by a 64-bit hash; with a few million of them two different ones collide
about once in a million runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_WORDS = 13
WARN_SHARE = 0.01
"""Share of the evaluation text from which a run says that the texts overlap: stock phrases alone stay far below it."""

_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd: the golden ratio in 64 bits


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two texts share.

    Attributes:
        shared: n-grams of the evaluation text that occur in the calibration text too.
        total: n-grams of the evaluation text.
        examples: the first shared passages, as normalised words.
    """

    shared: int
    total: int
    examples: tuple[str, ...]

    @property
    def share(self) -> float:
        """`shared / total`, from 0 to 1."""
        return self.shared / self.total if self.total else 0.0

    @property
    def warning(self) -> str | None:
        """One sentence when the texts overlap by `WARN_SHARE` or more, else None."""
        if self.share < WARN_SHARE:
            return None
        return (
            f"the calibration text holds {self.share:.1%} of the evaluation text's passages of {N_WORDS} words "
            f"(such as {self.examples[0]!r}): the results are too good; calibrate on another text."
        )


def overlap(calibration: str, evaluation: str, *, n_words: int = N_WORDS, examples: int = 3) -> Overlap:
    """Count the n-grams of `evaluation` that occur in `calibration`.

    Args:
        calibration: the whole text that was calibrated on.
        evaluation: the whole text that is evaluated.
        n_words: length of an n-gram; a text that has fewer words is taken as one n-gram of all its words.
        examples: how many shared passages to return at most, each from another place.

    Returns:
        The counts, and the first shared passages.
    """
    vocabulary: dict[str, int] = {}
    calibration_ids, evaluation_ids = _word_ids(calibration, vocabulary), _word_ids(evaluation, vocabulary)
    n = max(1, min(n_words, len(evaluation_ids)))
    known = np.unique(_hashes(calibration_ids, n))
    hits = np.isin(_hashes(evaluation_ids, n), known)
    where = np.flatnonzero(hits)
    passages: list[str] = []
    if len(where):
        words = list(vocabulary)
        starts = where[np.insert(np.diff(where) > n, 0, values=True)][:examples]
        passages = [" ".join(words[word] for word in evaluation_ids[start : start + n]) for start in starts]
    return Overlap(len(where), len(hits), tuple(passages))


def _word_ids(text: str, vocabulary: dict[str, int]) -> NDArray[np.uint64]:
    """Number the words of a text, adding new ones to `vocabulary`."""
    ids = [vocabulary.setdefault(word, len(vocabulary)) for word in _WORD.findall(text.lower())]
    return np.array(ids, dtype=np.uint64)


def _hashes(ids: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hash every n-gram of a sequence of word numbers, [T] -> [max(T - n + 1, 0)]: a polynomial over mixed word numbers."""
    count = max(len(ids) - n + 1, 0)
    mixed = (ids + np.uint64(1)) * np.uint64(_MULTIPLIER)
    mixed ^= mixed >> np.uint64(32)
    hashes = np.zeros(count, dtype=np.uint64)
    for position in range(n):
        hashes = hashes * np.uint64(_MULTIPLIER) + mixed[position : position + count]  # wraps modulo 2**64, as it should
        hashes ^= hashes >> np.uint64(29)
    return hashes
