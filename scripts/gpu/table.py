"""The tables of everything that was found, and the ratios that the project has set itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from gpu.findings import Finding

TITLES = {
    "verify": "Right? The largest error as a share of its derived bound, against fp64 on the device",
    "walls": "Ceilings",
    "kernels": "Kernels on cold weights: time, and share of the copy bandwidth (512 rows: of the peak of such products)",
    "model": "A random model of Llama-2-7B's shape, batch 1",
    "block": "GPTQ of a block",
    "quantize": "Quantized on both: what differs",
}
RATIOS = "Ratios"
_OWN = "int4 g=128, 4096 x 11008 (7B), rows: 1"


def show(findings: Sequence[Finding], where: str) -> None:
    """Print a table a part, the ratios, and one line that sums up."""
    console = Console(width=None if Console().is_terminal else 150)
    console.print(f"[bold]llmq on {where}[/bold]")
    for part, title in TITLES.items():
        mine = [each for each in findings if each.part == part]
        if mine:
            console.print(_by_rows(title, mine) if part == "kernels" else _plain(title, mine))
    told = ratios(findings)
    if told:
        table = _table(RATIOS, ("what", "ratio"), right={"ratio"})
        for name, value in told:
            table.add_row(name, f"{value:.2f}")
        console.print(table)
    wrong = [each for each in findings if each.wrong]
    left = [each for each in findings if "left out" in each.note]
    checked = [each for each in findings if each.part == "verify" and each.unit]
    more = f", {len(left)} left out (see the notes)." if left else "."
    console.print(f"{len(checked)} checks of kernels, {len(wrong)} findings wrong{more}")


def ratios(findings: Sequence[Finding]) -> list[tuple[str, float]]:
    """Return the project's own ratios, as far as both of their figures are there."""
    kernels = {(each.what, each.who): each.value for each in findings if each.part == "kernels" and each.unit}
    own = [value for (what, who), value in kernels.items() if what == _OWN and who.startswith("triton")]
    peer = kernels.get((_OWN, "tinygemm"))
    found = []
    if own and peer:
        found.append(("int4, one row, 4096 x 11008: own kernel's speed over tinygemm's", peer / min(own)))
    prefills = {each.what.partition(":")[0]: each.value for each in findings if each.unit and ": prefill" in each.what}
    if "bf16" in prefills and "int8-dynamic" in prefills:
        found.append(("prefill: int8-dynamic's speed over bf16's", prefills["bf16"] / prefills["int8-dynamic"]))
    return found


def _plain(title: str, findings: Sequence[Finding]) -> Table:
    further = list(dict.fromkeys(name for each in findings for name in each.more))
    table = _table(title, ("what", "by", "figure", "share", *further, "note"), right={"figure", "share", *further})
    for each in findings:
        share = "" if each.share is None else f"{each.share:.1%} of {each.wall}"
        more = ["" if name not in each.more else f"{each.more[name][0]:.4g} {_unit(each.more[name][1])}" for name in further]
        figure = f"{each.value:.4g} {_unit(each.unit)}" if each.unit else ""
        table.add_row(each.what, each.who, figure, share, *more, _note(each))
    return table


def _by_rows(title: str, findings: Sequence[Finding]) -> Table:
    """Return one line for each shape, format and kernel, with a column for each number of rows."""
    lines: dict[tuple[str, str], dict[str, Finding]] = {}
    for each in findings:
        what, _, rows = each.what.partition(", rows: ")
        lines.setdefault((what, each.who), {})[rows] = each
    columns = list(dict.fromkeys(rows for line in lines.values() for rows in line if rows))
    headings = [f"{rows} rows" if rows != "1" else "1 row" for rows in columns]
    table = _table(title, ("what", "kernel", *headings, "note"), right=set(headings))
    for (what, who), line in lines.items():
        table.add_row(what, who, *(_cell(line, rows) for rows in columns), _note(next(iter(line.values()))))
    return table


def _cell(line: Mapping[str, Finding], rows: str) -> str:
    if rows not in line:
        return ""
    found = line[rows]
    share = "" if found.share is None else f"{found.share:6.1%}"
    return f"{found.value:.4g} us {share}"


def _note(finding: Finding) -> str:
    return f"[bold red]WRONG[/bold red] {finding.wrong}" if finding.wrong else finding.note


def _unit(unit: str) -> str:
    return "" if unit == "1" else unit


def _table(title: str, headings: Sequence[str], *, right: set[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table
