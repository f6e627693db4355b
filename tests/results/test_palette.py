"""Colours can be read: WCAG 2's contrasts, on both backgrounds."""

from __future__ import annotations

import pytest

from llmq.results.palette import DARK, LIGHT, MARKERS, SERIES, contrast, series_colour, series_marker, series_name


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the grey that just fails AA
    assert contrast("#123456", "#123456") == 1.0


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_meet_aa(colours: dict[str, str]) -> None:
    for background in ("paper", "shade"):
        for text in ("ink", "muted", "series-1"):  # series-1 is also the colour of links
            assert contrast(colours[text], colours[background]) >= 4.5, (text, background)
    for name in (*SERIES, "line"):
        assert contrast(colours[name], colours["paper"]) >= 3.0, name


def test_both_modes_have_the_same_names_and_light_colours_differ() -> None:
    assert list(LIGHT) == list(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT)  # a plot's colours are found by their light value


def test_series_are_told_apart_by_colour_and_shape() -> None:
    both = {(series_colour(index), series_marker(index)) for index in range(len(SERIES) * len(MARKERS))}
    assert len(both) == len(SERIES) * len(MARKERS)
    assert series_name(0) == series_name(len(SERIES)) == "series-1"


def test_series_differ_in_lightness_or_shape_where_colour_is_not_seen() -> None:
    """Neighbours in a plot never share a shape, so nobody has to tell them by hue."""
    for index in range(60):
        assert series_marker(index) != series_marker(index + 1)
