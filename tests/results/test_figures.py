"""Digits: as many as are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.errors import UsageError
from llmq.results.figures import plain, size, with_error


@pytest.mark.parametrize(
    ("value", "stderr", "written"),
    [
        (5.47123, 0.00312, "5.471 ± 0.003"),
        (5.47123, 0.0277, "5.471 ± 0.028"),
        (1043.2, 17.0, "1043 ± 17"),
        (1043.2, 170.0, "1040 ± 170"),
        (98765.4, 3210.0, "99000 ± 3000"),
        (2.104e-5, 3.1e-7, "(2.10 ± 0.03)e-5"),
        (0.0, 0.001, "0.0000 ± 0.0010"),
        (0.0, 1.2e-9, "(0.0 ± 1.2)e-9"),
        (-0.0004, 0.0003, "-0.0004 ± 0.0003"),
        (-0.00001, 0.5, "0.0 ± 0.5"),
        (12.3, 0.0, "12.30 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (5.47123, None, "5.471"),
    ],
)
def test_the_error_says_how_many_digits(value: float, stderr: float | None, written: str) -> None:
    assert with_error(value, stderr).replace("-0.0 ±", "0.0 ±") == written


def test_factor_and_unit() -> None:
    assert with_error(0.98703, 0.0013, factor=100, unit=" %") == "98.70 ± 0.13 %"
    assert with_error(0.98703, None, factor=100, unit=" %") == "98.70 %"
    assert with_error(1.0, 0.0, factor=100, unit=" %") == "100.0 ± 0 %"


@given(st.floats(1e-3, 1e6), st.floats(1e-6, 1e3))
def test_what_is_written_is_within_its_error_of_what_was_measured(value: float, stderr: float) -> None:
    shown_value, shown_error = (float(part) for part in with_error(value, stderr).split(" ± "))
    assert abs(shown_value - value) <= 0.51 * stderr
    assert shown_error == pytest.approx(stderr, rel=0.26)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (5.4712, "5.471"),
        (0.99996, "1.000"),
        (0.012, "0.01200"),
        (1043.4, "1043"),
        (123456.0, "123456"),
        (2.14e-7, "2.1e-07"),
    ],
)
def test_without_an_error_four_digits_are_written(value: float, written: str) -> None:
    assert plain(value) == written


@pytest.mark.parametrize(
    ("nbytes", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (8_423_112, "8.42 MB"),
        (999_900, "1.00 MB"),
        (999_400_000, "999 MB"),
        (2_200_100_000, "2.20 GB"),
    ],
)
def test_sizes_are_decimal(nbytes: int, written: str) -> None:
    assert size(nbytes) == written


@pytest.mark.parametrize(("value", "stderr"), [(float("nan"), None), (1.0, float("inf")), (1.0, -0.1)])
def test_what_is_no_figure_is_refused(value: float, stderr: float | None) -> None:
    with pytest.raises(UsageError, match="a figure needs a finite value"):
        with_error(value, stderr)
