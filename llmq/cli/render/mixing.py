"""How sensitivities and the choices of a budget are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmq.cli.render.console import grid, show, stdout
from llmq.results.figures import plain, size

if TYPE_CHECKING:
    from llmq.api.mixing import Mixture
    from llmq.calibration.sensitivity_file import SensitivityTable

_WORST = 10
"""Linears that are named one by one: those that cost the model most."""


def sensitivities(table: SensitivityTable, out: Path) -> None:
    """Show what each candidate would cost, and which linears cost most."""
    sums = [[each.kl[index] for each in table.linears] for index in range(len(table.candidates))]
    cells = []
    for candidate, values in zip(table.candidates, sums, strict=True):
        known = [value for value in values if value is not None]
        k = table.linears[0].shape[1]
        cells.append(
            [
                candidate.name,
                _options(candidate.options_json()),
                f"{candidate.format.weight.bits_per_weight(k):.3f}",
                plain(sum(known), 3),
                f"{len(known)} of {len(values)}",
            ]
        )
    columns = [("candidate", "left"), ("options", "left"), ("bits/weight", "right"), ("KL, all linears", "right")]
    columns += [("fits", "right")]
    how = f"{table.held_out} held-out windows" if table.method == "measured" else "Fisher factors"
    show(grid(columns, cells), title=f"Candidates ({table.method}, {how}; KL in nats per token, summed over linears)")
    worst = sorted(table.linears, key=lambda each: -max((value for value in each.kl if value is not None), default=0.0))[:_WORST]
    columns = [("linear", "left"), *((f"{number + 1}", "right") for number in range(len(table.candidates)))]
    rows = [[each.fqn, *(plain(value, 2) if value is not None else "–" for value in each.kl)] for each in worst]
    show(grid(columns, rows), title="The most sensitive linears, by candidate")
    stdout().print(f"\n{len(table.linears)} linears written to {out}", soft_wrap=True)


def mixture(found: Mixture) -> None:
    """Show what each linear gets: a line for each block, a column for each kind of linear."""
    short = {name: _short(name) for name in dict.fromkeys(row.scheme for row in found.rows)}
    if len(set(short.values())) < len(short):
        short = {name: name for name in short}
    table: dict[str, dict[str, str]] = {}
    kinds: dict[str, None] = {}
    totals: dict[str, int] = {}
    for row in found.rows:
        block, kind = _split(row.fqn)
        table.setdefault(block, {})[kind] = short[row.scheme]
        kinds.setdefault(kind)
        totals[block] = totals.get(block, 0) + row.nbytes
    columns = [("block", "left"), *((kind, "right") for kind in kinds), ("size", "right")]
    cells = [[block, *(chosen.get(kind, "") for kind in kinds), size(totals[block])] for block, chosen in table.items()]
    legend = "; ".join(f"{mark} = {name}" for name, mark in short.items() if mark != name)
    proof = "no other choice is predicted to lose less" if found.proven else "the search was cut short; a better choice may exist"
    notes = [note for note in (legend, f"{found.sentence()}; {proof}.") if note]
    show(grid(columns, cells), title="Mixed precision", notes=notes)


def _split(fqn: str) -> tuple[str, str]:
    """Return the block of a linear, and its own name: 'model.layers.3' and 'up'."""
    parts = fqn.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return (".".join(parts[: last + 1]) if last >= 0 else fqn), parts[-1].removesuffix("_proj")


def _short(scheme: str) -> str:
    """Write 'int4-gptq:group_size=32' as '4g32'."""
    name, _, options = scheme.partition(":")
    bits = name.removeprefix("int").partition("-")[0]
    group = next((pair.partition("=")[2] for pair in options.split(",") if pair.startswith("group_size=")), "")
    return f"{bits}g{group}" if group else bits


def _options(options: dict[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items() if key == "group_size")
