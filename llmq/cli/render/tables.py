"""How each command's result is shown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmq.cli.render.console import grid, print_json, show, stderr, stdout
from llmq.results.figures import plain, size, with_error

if TYPE_CHECKING:
    from llmq.api.comparing import Comparison
    from llmq.api.evaluating import Evaluation
    from llmq.results.record import Metric, ResultRecord
    from llmq.results.table import Table

_QUALITY = (
    *("perplexity", "word perplexity", "Δ ln ppl", "KL (nats/token)", "same top-1"),
    *("bits/weight", "size", "KV/token", "KV at limit"),
)


def table(content: Table) -> None:
    """Draw a comparison table under its header; in two parts where the terminal is too narrow for one."""
    console = stdout()
    console.print(f"\n[bold]{content.title}[/bold]")
    for key, value in content.header.items():
        console.print(f"  [dim]{key:<9}[/dim] {value}", soft_wrap=not console.is_terminal, markup=True)
    console.print()
    parts = [list(range(len(content.columns)))]
    if _width(content, parts[0]) > console.width:
        quality = [i for i, column in enumerate(content.columns) if i == 0 or column.heading in _QUALITY]
        parts = [quality, [0, *(i for i in parts[0] if i not in quality)]]
    for part in parts:
        columns = [(content.columns[i].heading, "right" if content.columns[i].right else "left") for i in part]
        console.print(grid(columns, [[row[i] for i in part] for row in content.rows]))
        console.print()
    for note in content.notes:
        console.print(f"[dim]note: {note}[/dim]", soft_wrap=True)


def _width(content: Table, part: list[int]) -> int:
    return sum(2 + max(len(content.columns[i].heading), *(len(row[i]) for row in content.rows)) for i in part)


def comparison(result: Comparison) -> None:
    """Show what `llmq compare` found."""
    table(result.table)


def stored_table(content: Table, *, markdown: bool) -> None:
    """Show a table of stored records."""
    if markdown:
        from llmq.results.markdown import to_markdown

        Console(width=10_000, markup=False, highlight=False).out(to_markdown(content), highlight=False)
    else:
        table(content)


def demo_opening(model: Path) -> None:
    """Say what the demo is about to do."""
    from llmq.results.environment import cpu_name

    stdout().print(
        f"[bold]llmq demo[/bold]: which quantization of {model.name} to ship, and what it costs.\n"
        "  The model is a real Llama of 8.4 M parameters, trained for this project on WikiText-2; every figure below is\n"
        f"  measured now, on this machine ({cpu_name()}).\n",
        soft_wrap=True,
    )


def demo_closing(model: Path) -> None:
    """Say what to try next."""
    home = os.path.relpath(model)
    path = home if len(home) < len(str(model)) else str(model)
    program = "llmq" if shutil.which("llmq") else ".venv/bin/llmq"
    stdout().print(
        "\n[bold]Next[/bold], on this model or your own checkpoint (a Hugging Face folder, Meta, gpt-fast or llama2.c file):\n"
        f"  {program} quantize {path} --scheme int4-gptq -o /tmp/wt2-8m-int4\n"
        f'  {program} generate /tmp/wt2-8m-int4 "The ship was built in"\n'
        f"  {program} eval perplexity /tmp/wt2-8m-int4 --reference {path} --limit 48\n"
        f"  {program} compare {path} --schemes bf16,int4,int4-gptq -S group_size=32\n"
        f"  {program} report html latest -o /tmp/wt2-8m.html\n"
        f"  {program} --help",
        soft_wrap=True,
    )


def evaluation(result: Evaluation) -> None:
    """Show perplexity, divergence and the paired difference."""
    record = result.records[0]
    params = record.protocol.params
    console = stdout()
    console.print(
        f"\n[bold]{record.subject.model}[/bold], {record.subject.scheme}, "
        f"protocol {record.protocol.name} v{record.protocol.version}"
    )
    console.print(f"  text      {params['text']} (sha256 {params['text_sha256'][:12]})", soft_wrap=True)
    console.print(
        f"  windows   {params['n_windows']:,} of {params['length']:,} tokens, {params['n_scored_tokens']:,} tokens scored; "
        f"BOS: {params['bos']}",
        soft_wrap=True,
    )
    console.print(f"  kernels   {kernel_counts(record)}", soft_wrap=True)
    kv_cache(record)
    console.print()
    rows = [[*_metric_row(name, metric)] for each in result.records for name, metric in each.metrics.items()]
    if result.divergence is not None and result.divergence.identical:
        rows.append(["identical", "every logit is bit for bit the reference's", ""])
    if result.versus is not None:
        change = result.versus.delta_ln_perplexity
        rows.append(["Δ ln ppl, paired", with_error(change.value, change.stderr), "nats/token"])
        if result.versus.identical:
            rows.append(["identical", "every loss is bit for bit the same", ""])
    show(grid([("metric", "left"), ("value", "left"), ("unit", "left")], rows), notes=[f"note: {note}" for note in result.notes])


def kernel_counts(record: ResultRecord) -> str:
    """Name the kernels that ran, and for how many linears."""
    return ", ".join(f"{name} ({count} linears)" for name, count in record.kernels.items()) or "none recorded"


def kv_cache(record: ResultRecord) -> None:
    """Show which KV cache the model was measured with."""
    from llmq.results.table import cache_in_words

    if record.subject.kv_cache is not None:
        stdout().print(f"  KV cache  {cache_in_words(record.subject.kv_cache)}", soft_wrap=True)


def _metric_row(name: str, metric: Metric) -> tuple[str, str, str]:
    unit = "" if metric.unit == "1" else metric.unit
    if metric.unit == "bytes":
        return name, size(metric.value), ""
    return name, with_error(metric.value, metric.stderr), unit


def task_results(records: list[ResultRecord]) -> None:
    """Show lm-eval scores."""
    rows = [
        [
            str(record.protocol.params["task"]),
            metric,
            with_error(value.value, value.stderr),
            str(record.protocol.params["num_fewshot"]),
            str(record.protocol.params["n_documents"]),
        ]
        for record in records
        for metric, value in record.metrics.items()
    ]
    columns = [("task", "left"), ("metric", "left"), ("score", "right"), ("few-shot", "right"), ("documents", "right")]
    show(grid(columns, rows), title=f"{records[0].subject.model}, {records[0].subject.scheme}")


def speed(records: list[ResultRecord]) -> None:
    """Show prefill and decode, a table each."""
    console = stdout()
    first = records[0]
    console.print(f"\n[bold]{first.subject.model}[/bold], {first.subject.scheme}")
    console.print(
        f"  machine   {first.environment.cpu}, {first.environment.threads} threads; ± is one standard error", soft_wrap=True
    )
    prefill = [record for record in records if record.kind == "prefill"]
    decode = [record for record in records if record.kind == "decode"]
    for name, found in (("prefill", prefill), ("decode", decode)):
        for counts in dict.fromkeys(map(kernel_counts, found)):
            console.print(f"  {name:<9} {counts}", soft_wrap=True)
    kv_cache(first)
    columns = ["batch", "prompt", "tokens/s", "time to first token", "GFLOP/s", "peak memory"]
    rows = [
        [
            str(record.protocol.params["batch_size"]),
            str(record.protocol.params["prompt_length"]),
            _figure(record.metrics["tokens_per_s"]),
            _milliseconds(record.metrics["ttft_s"]),
            plain(record.metrics["gflops"].value, 3),
            size(record.metrics["peak_memory_bytes"].value),
        ]
        for record in prefill
    ]
    show(grid([(heading, "right") for heading in columns], rows), title="Prefill")
    columns = ["batch", "context", "tokens/s", "time per token", "bytes/step", "of it KV", "GB/s", "of bandwidth", "peak memory"]
    rows = [
        [
            str(record.protocol.params["batch_size"]),
            str(record.protocol.params["context"]),
            _figure(record.metrics["tokens_per_s"]),
            _milliseconds(record.metrics["tpot_s"]),
            size(record.metrics["bytes_per_step"].value),
            size(record.metrics["kv_bytes_per_step"].value),
            plain(record.metrics["bandwidth_gbps"].value, 3),
            f"{record.metrics['bandwidth_share'].value:.0%}" if "bandwidth_share" in record.metrics else "–",
            size(record.metrics["peak_memory_bytes"].value),
        ]
        for record in decode
    ]
    notes = [f"note: {note}" for note in dict.fromkeys(note for record in records for note in record.notes)]
    show(grid([(heading, "right") for heading in columns], rows), title="Decode", notes=notes)


def _figure(metric: Metric) -> str:
    return with_error(metric.value, metric.stderr)


def _milliseconds(metric: Metric) -> str:
    return with_error(metric.value, metric.stderr, factor=1e3, unit=" ms")


def bandwidth(record: ResultRecord) -> None:
    """Show the machine's walls."""
    rows = [[*_metric_row(name, metric)] for name, metric in record.metrics.items()]
    environment = record.environment
    show(
        grid([("wall", "left"), ("value", "left"), ("unit", "left")], rows),
        title=f"{environment.cpu}, {environment.threads} threads ({record.protocol.params['method']})",
    )


def kernel_speeds(records: list[ResultRecord]) -> None:
    """Show each kernel's time and share of the wall, one row a shape and number of rows."""
    columns = [("weight", "right"), ("rows", "right"), ("format", "left"), ("kernel", "left"), ("time", "right")]
    columns += [("GB/s", "right"), ("of bandwidth", "right"), ("GOP/s", "right"), ("share of peak", "right")]
    rows = []
    for record in records:
        params, metrics = record.protocol.params, record.metrics
        share = metrics.get("bandwidth_share")
        names = {"float32_peak_share": "fp32", "int8_peak_share": "int8"}
        peaks = [f"{metrics[key].value:.0%} of {name}" for key, name in names.items() if key in metrics]
        rows.append(
            [
                f"{params['n']}x{params['k']}",
                str(params["rows"]),
                str(params["format"]),
                next(iter(record.kernels)),
                with_error(metrics["call_s"].value, metrics["call_s"].stderr, factor=1e6, unit=" µs"),
                plain(metrics["bandwidth_gbps"].value, 3),
                f"{share.value:.0%}" if share else "–",
                plain(metrics["gops"].value, 3),
                peaks[0] if peaks else "–",
            ]
        )
    show(grid(columns, rows), title=f"{records[0].environment.cpu}, {records[0].environment.threads} threads")


def as_json(data: Any, *, json: bool) -> bool:
    """Print `data` as JSON when asked to; returns whether it did."""
    if json:
        print_json(data)
    return json


def hint(message: str) -> None:
    """Say one thing on standard error."""
    stderr().print(message, soft_wrap=True)
