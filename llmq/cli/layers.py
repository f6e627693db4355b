"""`llmq eval layers`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options as o

GROUP = "eval"
EXPLAINING = "What is explained"


def register(_: typer.Typer, group: typer.Typer) -> None:
    """Add the command."""
    group.command("layers")(layers)


def layers(
    model: o.Model,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="BASE",
            help="The original checkpoint; default: MODEL itself, where --scheme quantizes it now.",
            rich_help_panel=EXPLAINING,
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            metavar="SCHEME[:KEY=VALUE,…]|original",
            help="What a linear could be given; repeatable. Default: smaller groups, 8 bits, the original weight.",
            rich_help_panel=EXPLAINING,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", min=0, help="Overrides to recommend at most; 0: none.", rich_help_panel=EXPLAINING)
    ] = 5,
    alone: Annotated[
        bool, typer.Option("--alone", help="Also measure each linear quantized alone.", rich_help_panel=EXPLAINING)
    ] = False,
    sort: Annotated[
        str,
        typer.Option(
            "--sort", metavar="worst|layer", help="The worst first, or all in the model's order.", rich_help_panel=o.OUTPUT
        ),
    ] = "worst",
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to measure losses on. Default: WikiText-2's validation split, else the bundled text.",
            rich_help_panel=o.TEXT,
        ),
    ] = None,
    window: o.Window = None,
    windows: Annotated[int, typer.Option("--windows", min=2, help="Windows to measure losses on.", rich_help_panel=o.TEXT)] = 16,
    scheme: o.Scheme = None,
    option: o.SchemeOptions = None,
    override: o.Overrides = None,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    calibration_length: o.CalibrationLength = None,
    column: o.CalibrationColumn = "text",
    chat_template: o.ChatTemplate = None,
    dtype: o.Dtype = "bf16",
    threads: o.Threads = None,
    seed: o.Seed = 0,
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Explain the loss: what each quantized linear costs, and which overrides buy most for their bytes."""
    from llmq.api.explaining import LayersRequest, explain_layers
    from llmq.cli import render
    from llmq.results.layers import order_of

    order = order_of(sort)
    source = o.calibration_source(
        calibration, calibration_windows, calibration_length, column=column, chat_template=chat_template
    )
    recipe = o.recipe(scheme, option, skip, source, skip_unfit=skip_unfit, lm_head=lm_head, overrides=override)
    request = LayersRequest(windows, top, text, window, tuple(candidate or ()), alone, source)
    with render.reporting(quiet=json) as progress:
        setup = o.setup("cpu", dtype, threads, None, seed)
        found = explain_layers(model, request, recipe, setup, reference=reference, progress=progress)
    render.save_records([found.record], record)
    render.records_or_json([found.record], json=json)
    if not json:
        render.explanation(found, order)
