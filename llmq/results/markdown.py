"""Tables as Markdown, and the sections of a document that are generated from records."""

from __future__ import annotations

import re

from llmq.errors import UsageError
from llmq.results.table import Table


def to_markdown(table: Table) -> str:
    """Return what is common to all rows, one line each, then a pipe table, then the notes; without a final line break."""
    lines = [f"**{_escape(key)}:** {_escape(value)}  " for key, value in table.header.items()]
    if lines:
        lines.append("")
    widths = [
        max(3, len(_escape(column.heading)), *(len(_escape(row[index])) for row in table.rows))
        for index, column in enumerate(table.columns)
    ]
    lines.append(_line([column.heading for column in table.columns], table, widths))
    rule = [
        ("-" * (width - 1) + ":") if column.right else "-" * width for column, width in zip(table.columns, widths, strict=True)
    ]
    lines.append(f"| {' | '.join(rule)} |")
    lines += [_line(list(row), table, widths) for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {_escape(note)}" for note in table.notes)]
    return "\n".join(lines)


def update_marked_section(text: str, name: str, content: Table | str) -> str:
    """Return the document `text` with `content` between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        UsageError: the document does not have exactly one such pair of markers.
    """
    before, _, after = _cut(text, name)
    return f"{before}\n\n{_rendered(content)}\n\n{after}"


def is_fresh(text: str, name: str, content: Table | str) -> bool:
    """Whether the marked section of the document `text` is what `update_marked_section` would make it.

    Raises:
        UsageError: the document does not have exactly one such pair of markers.
    """
    return update_marked_section(text, name, content) == text


def _cut(text: str, name: str) -> tuple[str, str, str]:
    """Return the document up to and with the first marker, what is between the two, and the rest from the second on."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(
            f"the document needs one line {begin!r} and, after it, one line {end!r}; got {text.count(begin)} and "
            f"{text.count(end)}: write the two where the section belongs."
        )
    first, last = text.index(begin) + len(begin), text.index(end)
    return text[:first], text[first:last], text[last:]


def _rendered(content: Table | str) -> str:
    return content.strip("\n") if isinstance(content, str) else to_markdown(content)


def _line(cells: list[str], table: Table, widths: list[int]) -> str:
    padded = [
        _escape(cell).rjust(width) if column.right else _escape(cell).ljust(width)
        for cell, column, width in zip(cells, table.columns, widths, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _escape(cell: str) -> str:
    """Keep a text on its line and in its cell, and let no mark-up out of it."""
    return re.sub(r"([\\`*|<])", r"\\\1", re.sub(r"\s*\n\s*", " ", cell))
