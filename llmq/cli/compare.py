"""`llmq compare` and `llmq demo`: the table that answers which quantization to ship."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import options as o

GROUP = ""
DEFAULT_SCHEMES = "bf16,int8-weight-only,int8-dynamic,int8-dynamic-int4,int4,int4-gptq"

Schemes = Annotated[
    str,
    typer.Option(
        "--schemes", metavar="A,B,…", help="Schemes to compare; the first is not special, the reference is --reference."
    ),
]
Reference = Annotated[
    str,
    typer.Option("--reference", help="Baseline that divergence is measured against: bf16, fp16 or fp32.", rich_help_panel=o.TEXT),
]
KvCaches = Annotated[
    str,
    typer.Option(
        "--kv-cache",
        metavar="A,B,…",
        help="KV caches to measure each scheme with: auto (the compute dtype), fp32, bf16, fp16, int8.",
        rich_help_panel=o.RUNNING,
    ),
]
Bench = Annotated[bool, typer.Option("--bench/--no-bench", help="Measure speed too.", rich_help_panel=o.RUNNING)]
PromptLength = Annotated[
    int | None,
    typer.Option(
        "--prompt-length",
        min=1,
        help="Tokens of the benched prompt; default: 128, or half the context.",
        rich_help_panel=o.RUNNING,
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        "--new-tokens",
        min=1,
        help="Tokens decoded after it; default: 64, or a quarter of the context.",
        rich_help_panel=o.RUNNING,
    ),
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Repeats of each timing.", rich_help_panel=o.RUNNING)]


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the commands."""
    app.command("compare")(compare)
    app.command("demo")(demo)


def compare(
    model: o.Model,
    schemes: Schemes = DEFAULT_SCHEMES,
    option: o.SchemeOptions = None,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    calibration_length: o.CalibrationLength = None,
    column: o.CalibrationColumn = "text",
    chat_template: o.ChatTemplate = None,
    text: o.Text = None,
    protocol: o.ProtocolName = "windows",
    window: o.Window = None,
    limit: o.Limit = None,
    reference: Reference = "bf16",
    bench: Bench = True,
    prompt_length: PromptLength = None,
    new_tokens: NewTokens = None,
    repeats: Repeats = 5,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    kernel: o.Kernel = None,
    kv_cache: KvCaches = "auto",
    runtime: o.Runtime = "auto",
    seed: o.Seed = 0,
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Compare schemes on one checkpoint: perplexity, divergence, tokens/s, bandwidth, bits per weight, size.

    An option of a scheme (-S) goes to every scheme that has it; write scheme:key=value to set it for one.
    """
    from llmq.api.comparing import CompareRequest, SpeedQuestion, compare_schemes
    from llmq.api.evaluating import Question
    from llmq.cli import render

    with render.reporting(quiet=json) as progress:
        comparison = compare_schemes(
            CompareRequest(
                model=model,
                schemes=list(o.names(schemes)),
                options=o.key_values(option),
                skip=tuple(skip or ()),
                skip_unfit=skip_unfit,
                lm_head=lm_head,
                calibration=o.calibration_source(
                    calibration, calibration_windows, calibration_length, column=column, chat_template=chat_template
                ),
                question=Question(text, protocol, window, limit),
                reference=reference,
                bench=SpeedQuestion(prompt_length, new_tokens, repeats) if bench else None,
                kv_caches=o.names(kv_cache),
            ),
            o.setup(device, dtype, threads, kernel, seed, runtime=runtime),
            progress=progress,
        )
    render.save_records(comparison.records, record)
    render.records_or_json(comparison.records, json=json)
    if not json:
        render.comparison(comparison)


def demo(
    limit: Annotated[int, typer.Option("--limit", min=1, help="Evaluate this many windows of 256 tokens.")] = 48,
    schemes: Schemes = DEFAULT_SCHEMES,
    threads: o.Threads = None,
    record: o.RecordFile = None,
) -> None:
    """Compare the schemes on the bundled 8 M parameter Llama: about a minute on two cores."""
    import llmq
    from llmq.cli import render

    bundled = Path(str(llmq.__file__)).parent / "assets" / "wt2-8m"
    render.demo_opening(bundled)
    compare(str(bundled), schemes=schemes, limit=limit, calibration_windows=48, repeats=3, threads=threads, record=record)
    render.demo_closing(bundled)
