"""A scatter plot as SVG text: a marker a row, a colour a tool, a logarithmic second axis. No library, so bytes are stable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 20, 50
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
LLMQ = "llmq"


@dataclass(frozen=True, slots=True)
class Point:
    """One row: what it is called, who made it, bits per weight, and KL in nats per token."""

    name: str
    tool: str
    x: float
    y: float


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Return the plot; points whose KL is 0 have no place on a logarithmic axis, and are left out."""
    shown = [point for point in points if point.y > 0]
    tools = sorted({point.tool for point in shown}, key=lambda tool: (tool != LLMQ, tool))
    colours = {tool: COLOURS[index % len(COLOURS)] for index, tool in enumerate(tools)}
    low, high = (floor(min((p.x for p in shown), default=2) * 2) / 2, ceil(max((p.x for p in shown), default=5) * 2) / 2)
    high = max(high, low + 0.5)
    bottom = min((log10(point.y) for point in shown), default=-3.0) - 0.05
    top = max((log10(point.y) for point in shown), default=-1.0) + 0.05

    def across(x: float) -> float:
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(logarithm: float) -> float:
        return TOP + (top - logarithm) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for half in range(round(low * 2), round(high * 2) + 1):
        x = across(half / 2)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{half / 2:g}</text>')
    for value in _ticks(bottom, top):
        y = down(log10(value))
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for point in sorted(shown, key=lambda point: point.tool == LLMQ):  # ours are drawn last, and seen
        x, y = across(point.x), down(log10(point.y))
        title = f"<title>{escape(point.name)}: {point.x:.3f} bits, KL {point.y:.5f}</title>"
        colour = colours[point.tool]
        if point.tool == LLMQ:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" fill-opacity="0.8">{title}</circle>')
        else:
            corner = f'x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
            parts.append(f'<rect {corner} fill="{colour}" fill-opacity="0.8">{title}</rect>')
    for index, tool in enumerate(tools):
        y = TOP + 14 + 20 * index
        parts.append(f'<rect x="{WIDTH - RIGHT + 16}" y="{y - 9}" width="10" height="10" fill="{colours[tool]}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 32}" y="{y}">{escape(tool)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2:.1f}" y="16"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(bottom: float, top: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two decimal logarithms."""
    found = [digit * 10.0**power for power in range(floor(bottom), ceil(top) + 1) for digit in (1, 2, 5)]
    return [value for value in found if bottom <= log10(value) <= top]
