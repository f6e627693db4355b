"""A report as one HTML page that needs nothing but itself: tables, plots, and what stands behind every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llmq.errors import UsageError
from llmq.progress import SILENT, Progress
from llmq.results import figures
from llmq.results.drawing_svg import to_inline_svg
from llmq.results.groups import COMPARED, Group, comparable_groups
from llmq.results.palette import DARK, LIGHT, MARKERS, series_marker, series_name
from llmq.results.plot_types import HeatMaps
from llmq.results.plots import plots_of
from llmq.results.record import ResultRecord
from llmq.results.run import Run
from llmq.results.table import KINDS, Cell, Difference, Table, comparison_table, subject_label


@dataclass(frozen=True, slots=True)
class Heading:
    """Of a column. `spoken` is read out where `text` is not enough; `number` says how its cells are aligned and sorted."""

    text: str
    spoken: str
    number: bool = True


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot that is drawn, and what is said below it."""

    name: str
    title: str
    caption: str
    svg: Markup
    wide: bool


@dataclass(frozen=True)
class Section:
    """Records that may be compared, laid out."""

    number: int
    title: str
    runs: Sequence[str]
    apart: str
    table: Table | None
    headings: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    figures: Sequence[Figure]
    records: Sequence[tuple[str, ResultRecord]]
    """Each with the label of its row."""


def render_page(runs: Sequence[Run], *, progress: Progress = SILENT) -> str:
    """Return the page of runs; the same records give the same text.

    Raises:
        UsageError: there is no record in them.
    """
    if not any(run.records for run in runs):
        raise UsageError(f"there is no record in {', '.join(run.name for run in runs) or 'no run'}; name runs that hold some.")
    sections = [_section(number, group, progress) for number, group in enumerate(comparable_groups(runs), start=1)]
    others = {record.id: record for run in runs for record in run.records if record.kind not in COMPARED}
    environment = Environment(
        loader=PackageLoader("llmq.results", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"apart": figures.apart, "size": figures.size, "words": _in_words}
    page = environment.get_template("report.html.j2").render(
        models=list(dict.fromkeys(record.subject.model for section in sections for _, record in section.records)),
        runs=[run.name for run in runs],
        sections=sections,
        others=[(record.subject.scheme, record) for record in others.values()],
        light=_variables(LIGHT),
        dark=_variables(DARK),
        series=[(series_name(index), MARKERS[series_marker(index)]) for index in range(_most_rows(sections))],
    )
    return page.rstrip() + "\n"


def _section(number: int, group: Group, progress: Progress) -> Section:
    table = comparison_table(group.records) if any(record.kind in KINDS for record in group.records) else None
    headings, rows = ([], []) if table is None else _columns(table)
    plots = plots_of(group.records)
    drawn = []
    with progress.task("drawing plots", len(plots)) as advance:
        for plot in plots:
            svg = Markup(to_inline_svg(plot, f"s{number}-{plot.name}"))  # noqa: S704 - its texts were escaped as XML
            drawn.append(Figure(plot.name, plot.title, plot.caption, svg, isinstance(plot, HeatMaps)))
            advance(1)
    labelled = _labelled(group.records)
    title = table.title if table is not None else f"{group.records[0].subject.model}: one linear at a time"
    return Section(number, title, group.runs, _apart(group.apart), table, headings, rows, drawn, labelled)


def _labelled(records: Sequence[ResultRecord]) -> list[tuple[str, ResultRecord]]:
    """Return records with the labels that they have in the table and in the plots, those of one label together."""
    found: dict[str, list[ResultRecord]] = {}
    for alike in ([record for record in records if (record.kind in KINDS) is in_table] for in_table in (True, False)):
        subjects = [record.subject for record in alike]
        for record in alike:
            found.setdefault(subject_label(record.subject, subjects), []).append(record)
    return [(label, record) for label, own in found.items() for record in own]


def _apart(found: Difference | None) -> str:
    """Say what keeps a section from being compared with the first one."""
    if found is None:
        return ""
    of_kind = f"of {found.kind} " if found.kind else ""
    first, here = found.values
    return f"its records {of_kind}have {found.field} {_in_words(here)}, those of section 1 have {_in_words(first)}"


def _columns(table: Table) -> tuple[list[Heading], list[list[Cell]]]:
    """Return the table with errors in columns of their own, so that digits stand below digits."""
    headings: list[Heading] = []
    rows: list[list[Cell]] = [[] for _ in table.cells]
    for index, column in enumerate(table.columns):
        cells = [row[index] for row in table.cells]
        with_errors = any(cell.stderr is not None for cell in cells)
        percent = any(cell.factor == 100.0 for cell in cells)
        name = column.heading + (" (%)" if percent else "")
        headings.append(Heading(name, name, column.right))
        headings += [Heading("±", f"standard error of {name}")] if with_errors else []
        for place, cell in enumerate(cells):
            rows[place] += _apart_cells(cell) if with_errors else [cell]
    return headings, rows


def _apart_cells(cell: Cell) -> list[Cell]:
    if cell.value is None:
        return [cell, Cell("")]
    value, error = figures.apart(cell.value, cell.stderr, factor=cell.factor)
    return [Cell(value, cell.value), Cell("" if cell.stderr is None else error, cell.stderr)]


def _most_rows(sections: Iterable[Section]) -> int:
    return max((len(section.rows) for section in sections), default=0)


def _variables(colours: Mapping[str, str]) -> Markup:
    return Markup("; ".join(f"--{name}: {colour}" for name, colour in colours.items()))  # noqa: S704 - our own palette


def _in_words(value: Any) -> str:
    """Write a parameter or an option."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value)) or "none"
    return str(value)
