"""Colours of pages and plots, light and dark; series can be told apart without seeing red, green or blue."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "ink": "#1c2128",
    "muted": "#59636e",
    "grid": "#e4e7eb",
    "shade": "#f4f6f8",
    "line": "#868f99",
    "series-1": "#0b6bb3",
    "series-2": "#c2510a",
    "series-3": "#0a7d5c",
    "series-4": "#9b3f86",
    "series-5": "#8c6a00",
    "series-6": "#3d4fc4",
    "series-7": "#b3243b",
    "series-8": "#47707f",
}
"""Of plots in files, and of a page on a light screen. No two names share a colour."""

DARK: Mapping[str, str] = {
    "paper": "#161b22",
    "ink": "#e8ecf1",
    "muted": "#a3adb8",
    "grid": "#2d343d",
    "shade": "#1f262f",
    "line": "#707a86",
    "series-1": "#61b3f2",
    "series-2": "#f29355",
    "series-3": "#3fcba0",
    "series-4": "#e08fcb",
    "series-5": "#e3bd45",
    "series-6": "#a0a9ff",
    "series-7": "#ff8292",
    "series-8": "#9cc3d1",
}
"""The same names on a dark screen."""

SERIES = tuple(name for name in LIGHT if name.startswith("series-"))

MARKERS: Mapping[str, str] = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
"""Shapes of points by matplotlib's names, and characters that look like them. No two of 56 series share colour and shape."""


def series_name(series: int) -> str:
    """Return the name of a series' colour."""
    return SERIES[series % len(SERIES)]


def series_marker(series: int) -> str:
    """Return matplotlib's name of the shape of a series' points."""
    return list(MARKERS)[series % len(MARKERS)]


def series_colour(series: int) -> str:
    """Return the light colour of a series."""
    return LIGHT[series_name(series)]


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours '#rrggbb' as WCAG 2 defines it: 1 for the same, 21 for black on white."""
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
