"""Tolerances: the shipped file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmq.errors import InputError
from llmq.results.tolerances import default_tolerances, read_tolerances

REPO = Path(__file__).parents[2]


def test_the_file_in_configs_is_the_one_that_is_installed() -> None:
    assert (REPO / "configs" / "regression.toml").resolve() == default_tolerances().resolve()
    assert read_tolerances().quality.ln_perplexity_increase_nats == 0.002


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("slowdown_percent", "slowdown_percents", "unknown key speed.slowdown_percents. Did you mean 'slowdown_percent'?"),
        ('missing = "fail"', 'mising = "fail"', "unknown key mising. Did you mean 'missing'?"),
        (
            "kl_increase_nats = 0.0002",
            "kl_increase_nats = -1",
            "quality.kl_increase_nats must be greater than or equal to 0, got -1",
        ),
        ("confidence = 0.99", "confidence = 1.0", "quality.confidence must be less than 1"),
        ('different_kernel = "fail"', 'different_kernel = "panic"', "speed.different_kernel must be 'fail', 'warn' or 'allow'"),
        ("growth_bytes = 0", "", "size.growth_bytes is missing; add it."),
        ("[quality]", "[quality", "is not TOML"),
        ("growth_bytes = 0", "growth_bytes = 0.5", "size.growth_bytes must be a valid integer"),
    ],
)
def test_what_is_refused(before: str, after: str, says: str, tmp_path: Path) -> None:
    text = default_tolerances().read_text()
    assert before in text
    (tmp_path / "own.toml").write_text(text.replace(before, after, 1))
    with pytest.raises(InputError) as refused:
        read_tolerances(tmp_path / "own.toml")
    assert says in str(refused.value)
    assert "own.toml" in str(refused.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_tolerances(tmp_path / "none.toml")
