"""How it is shown which kernels the linears of a model run on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmq.cli.render.console import grid, print_json, show

if TYPE_CHECKING:
    from llmq.ops.select import KernelChoice


def kernel_choices(choices: Sequence[KernelChoice], *, json: bool) -> None:
    """Show the choices, those of the same linear in every block together."""
    if json:
        print_json([dataclasses.asdict(choice) for choice in choices])
        return
    counts: dict[tuple[str, ...], int] = {}
    for choice in choices:
        linear = re.sub(r"\.\d+\.", ".*.", choice.fqn).removesuffix(".weight")
        line = (linear, choice.kernels, choice.layout, choice.why)
        counts[line] = counts.get(line, 0) + 1
    columns = [("linears", "left"), ("of them", "right"), ("kernels", "left"), ("layout", "left"), ("why", "left")]
    cells = [[line[0], str(count), *line[1:]] for line, count in counts.items()]
    show(grid(columns, cells), title="Kernels of the quantized linears")
