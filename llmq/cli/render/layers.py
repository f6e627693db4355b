"""How the loss of a quantized model, explained linear by linear, is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.cli.render.console import grid, show, stdout
from llmq.results.figures import with_error

if TYPE_CHECKING:
    from llmq.api.explained import Explanation
    from llmq.results.layers import Order
    from llmq.results.record import Metric
    from llmq.results.table import Table


def explanation(found: Explanation, order: Order) -> None:
    """Show what linears cost, what is recommended, and whether that holds."""
    from llmq.results.layers import block_table, linear_table, notes_of, pick_table, verification_table

    record = found.record
    params, metrics, console = record.protocol.params, record.metrics, stdout()
    console.print(f"\n[bold]{record.subject.model}[/bold], {record.subject.scheme}, against {params['reference']}")
    console.print(f"  text      {params['text']} (sha256 {params['text_sha256'][:12]})", soft_wrap=True)
    console.print(
        f"  windows   {params['n_windows']:,} of {params['length']:,} tokens, {params['n_scored_tokens']:,} tokens scored; "
        f"± is one standard error",
        soft_wrap=True,
    )
    console.print(
        f"  loss      KL {_figure(metrics['kl_mean'])}, Δ ln ppl {_figure(metrics['delta_ln_perplexity'])} nats/token",
        soft_wrap=True,
    )
    for content in (block_table(record, order), linear_table(record, order), pick_table(record), verification_table(record)):
        if content is not None:
            _show(content)
    if found.sought and not found.picks:
        console.print("\nNo override is recommended: no linear's cost is beyond two standard errors, or no candidate helps.")
    for note in notes_of(record):
        console.print(f"[dim]note: {note}[/dim]", soft_wrap=True)


def _show(content: Table) -> None:
    columns = [(column.heading, "right" if column.right else "left") for column in content.columns]
    show(grid(columns, [list(row) for row in content.rows]), title=content.title, notes=list(content.notes))


def _figure(metric: Metric) -> str:
    return with_error(metric.value, metric.stderr)
