"""`llmq plan`: size, memory and time of a quantization before hours are spent."""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options as o

GROUP = ""


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    model: o.Model,
    scheme: Annotated[
        str, typer.Option("--scheme", "-s", help="Scheme to apply; see `llmq schemes`.", rich_help_panel=o.QUANTIZING)
    ],
    option: o.SchemeOptions = None,
    override: o.Overrides = None,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    calibration_length: o.CalibrationLength = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Quantize the first block in a temporary folder, to predict the time too."),
    ] = False,
    activations: o.Activations = "bf16",
    spill: o.Spill = None,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Predict size, peak memory and (with --measure) time of `llmq quantize` with the same options; writes nothing.

    Size and memory come from the checkpoint's headers: no weight is read for them.
    """
    from llmq.api.planning import plan_quantization
    from llmq.cli import render

    source = o.calibration_source(calibration, calibration_windows, calibration_length)
    recipe = o.recipe(scheme, option, skip, source, skip_unfit=skip_unfit, lm_head=lm_head, overrides=override)
    assert recipe is not None
    setup = o.setup(device, dtype, threads, None, seed)
    with render.reporting(quiet=json) as progress:
        planned = plan_quantization(
            model, recipe, setup, activations=activations, spill=o.spill(spill), measure=measure, progress=progress
        )
    render.plan(planned, json=json)
