"""`llmq calibrate`, `llmq quantize` and `llmq generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import mixing, processes
from llmq.cli import options as o

GROUP = ""


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the commands."""
    app.command("quantize")(quantize)
    app.command("calibrate")(calibrate)
    app.command("generate")(generate)


def quantize(
    model: o.Model,
    scheme: Annotated[
        str, typer.Option("--scheme", "-s", help="Scheme to apply; see `llmq schemes`.", rich_help_panel=o.QUANTIZING)
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.", rich_help_panel=o.OUTPUT)] = None,
    option: o.SchemeOptions = None,
    override: o.Overrides = None,
    target_bpw: mixing.TargetBits = None,
    target_size: mixing.TargetSize = None,
    sensitivity: mixing.SensitivityFile = None,
    candidate: mixing.Candidates = None,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    rotate: o.Rotate = "auto",
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    calibration_length: o.CalibrationLength = None,
    column: o.CalibrationColumn = "text",
    chat_template: o.ChatTemplate = None,
    eval_text: o.EvalText = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan without reading any weight.", rich_help_panel=o.OUTPUT)
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End with an error where a layer falls back or texts overlap.", rich_help_panel=o.RUNNING),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away what an unfinished run left in OUT.partial.", rich_help_panel=o.OUTPUT),
    ] = False,
    activations: o.Activations = "bf16",
    spill: o.Spill = None,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    seed: o.Seed = 0,
    force: o.Force = False,
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Quantize a checkpoint and write it: safetensors with canonical codes, and llmq.json that says how it was made.

    A run that was killed, interrupted or ran out of disk goes on where it stopped when the same command is given again.
    """
    from llmq.api.planning import plan_quantization
    from llmq.api.quantizing import Running, quantize_checkpoint
    from llmq.cli import render
    from llmq.errors import UsageError

    source = o.calibration_source(
        calibration, calibration_windows, calibration_length, column=column, chat_template=chat_template, eval_text=eval_text
    )
    recipe = o.recipe(scheme, option, skip, source, skip_unfit=skip_unfit, lm_head=lm_head, overrides=override)
    assert recipe is not None
    recipe = replace(recipe, rotate=rotate)
    setup = o.setup(device, dtype, threads, None, seed, several=not dry_run)
    where = o.spill(spill)
    target = mixing.target_of(target_bpw, target_size, sensitivity, candidate)
    if target is not None:
        if rotate not in ("auto", "none"):
            raise UsageError("a budget is solved from sensitivities of the model as it is; leave --rotate out, or the target.")
        recipe = replace(recipe, rotate="none")
        with render.reporting(quiet=json or not processes.speaks()) as progress:
            mixture = mixing.mix(model, recipe, setup, (target, sensitivity, candidate), progress=progress)
        recipe = replace(recipe, overrides=mixture.overrides, allocation=mixture.to_json())
        if processes.speaks() and not json:
            render.mixture(mixture)
    if dry_run:
        render.plan(plan_quantization(model, recipe, setup, activations=activations, spill=where), json=json)
        return
    if out is None:
        raise UsageError("nowhere to write to: name a folder with --out, or ask for the plan with --dry-run.")
    with processes.shared(), render.reporting(quiet=json or not processes.speaks()) as progress:
        how = Running(force=force, restart=restart, strict=strict, activations=activations, spill=where)
        result = quantize_checkpoint(model, recipe, setup, out, how=how, progress=progress)
    if result is None:  # another process of several prints and records
        return
    render.save_records([result.record], record)
    render.records_or_json([result.record], json=json)
    if not json:
        render.quantized(result)


def calibrate(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).", rich_help_panel=o.OUTPUT)],
    calibration: o.Calibration = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Record windows of this text.", rich_help_panel=o.CALIBRATING)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="NAME|FILE",
            help="Record from a `datasets` dataset or a local JSONL file.",
            rich_help_panel=o.CALIBRATING,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="A,B,…", help="Record the prompts of lm-eval tasks.", rich_help_panel=o.CALIBRATING),
    ] = None,
    column: o.CalibrationColumn = "text",
    chat_template: o.ChatTemplate = None,
    windows: o.CalibrationWindows = None,
    length: o.CalibrationLength = None,
    seed: o.Seed = 0,
    force: o.Force = False,
) -> None:
    """Record token windows into a calibration set that any run can reuse. Default source: WikiText-2's training split."""
    from llmq.api.calibrating import CalibrationInput, record_calibration
    from llmq.cli import render

    source = CalibrationInput(text, dataset, tasks, column, windows, length, tuple(calibration or ()), chat_template)
    with render.reporting() as progress:
        recorded = record_calibration(model, source, out, seed=seed, force=force, progress=progress)
    render.calibration_set(recorded, out)


def generate(
    model: o.Model,
    prompt: Annotated[str, typer.Argument(help="Text to complete.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw from the K likeliest tokens.")] = None,
    scheme: o.Scheme = None,
    option: o.SchemeOptions = None,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    kernel: o.Kernel = None,
    kv_cache: o.KvCache = "auto",
    runtime: o.Runtime = "auto",
    seed: o.Seed = 0,
) -> None:
    """Complete a prompt."""
    from llmq.api.generating import complete
    from llmq.cli import render

    source = o.calibration_source()
    recipe = o.recipe(scheme, option, skip, source, skip_unfit=skip_unfit, lm_head=lm_head)
    with render.reporting() as progress:
        pieces = complete(
            model,
            prompt,
            recipe,
            o.setup(device, dtype, threads, kernel, seed, kv_cache=kv_cache, runtime=runtime),
            (max_new_tokens, temperature, top_k),
            progress=progress,
        )
    render.stream(prompt, pieces)
