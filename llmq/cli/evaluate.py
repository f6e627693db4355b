"""`llmq eval perplexity` and `llmq eval tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import options as o
from llmq.cli import processes

GROUP = "eval"


def register(_: typer.Typer, group: typer.Typer) -> None:
    """Add the commands."""
    group.command("perplexity")(perplexity)
    group.command("tasks")(tasks)


def perplexity(
    model: o.Model,
    protocol: o.ProtocolName = "windows",
    text: o.Text = None,
    window: o.Window = None,
    limit: o.Limit = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Also measure KL divergence and top-1 agreement with this checkpoint.",
            rich_help_panel=o.TEXT,
        ),
    ] = None,
    losses: Annotated[
        Path | None,
        typer.Option("--losses", metavar="FILE", help="Store the per-token losses (.safetensors).", rich_help_panel=o.OUTPUT),
    ] = None,
    versus: Annotated[
        Path | None,
        typer.Option(
            "--versus",
            metavar="FILE",
            help="Compare, token by token, with losses that --losses stored.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    scheme: o.Scheme = None,
    option: o.SchemeOptions = None,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    calibration_length: o.CalibrationLength = None,
    column: o.CalibrationColumn = "text",
    chat_template: o.ChatTemplate = None,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    kernel: o.Kernel = None,
    kv_cache: o.KvCache = "auto",
    runtime: o.Runtime = "auto",
    seed: o.Seed = 0,
    force: o.Force = False,
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Measure perplexity under a named protocol, and divergence from a reference."""
    from llmq.api.evaluating import EvaluationFiles, Question, evaluate_model
    from llmq.cli import render

    source = o.calibration_source(
        calibration, calibration_windows, calibration_length, column=column, chat_template=chat_template
    )
    recipe = o.recipe(scheme, option, skip, source, skip_unfit=skip_unfit, lm_head=lm_head)
    with processes.shared(), render.reporting(quiet=json or not processes.speaks()) as progress:
        evaluation = evaluate_model(
            model,
            recipe,
            o.setup(device, dtype, threads, kernel, seed, kv_cache=kv_cache, runtime=runtime, several=True),
            Question(text, protocol, window, limit),
            reference=reference,
            files=EvaluationFiles(losses, versus, force),
            progress=progress,
        )
    if not processes.speaks():
        return
    render.save_records(evaluation.records, record)
    render.records_or_json(evaluation.records, json=json)
    if not json:
        render.evaluation(evaluation)


def tasks(
    model: o.Model,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="A,B,…", help="lm-eval tasks, such as arc_easy,hellaswag.", rich_help_panel=o.TEXT)
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first N documents of a task.", rich_help_panel=o.TEXT)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", min=0, help="Examples before each question; default: the task's.", rich_help_panel=o.TEXT),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with more task definitions.", rich_help_panel=o.TEXT)
    ] = None,
    scheme: o.Scheme = None,
    option: o.SchemeOptions = None,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    calibration: o.Calibration = None,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    kernel: o.Kernel = None,
    kv_cache: o.KvCache = "auto",
    runtime: o.Runtime = "auto",
    seed: o.Seed = 0,
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Run lm-eval tasks."""
    from llmq.api.evaluating import TaskRequest, evaluate_on_tasks
    from llmq.cli import render

    recipe = o.recipe(scheme, option, skip, o.calibration_source(calibration), skip_unfit=skip_unfit, lm_head=lm_head)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with render.reporting(quiet=json) as progress:
        records = evaluate_on_tasks(
            model,
            recipe,
            o.setup(device, dtype, threads, kernel, seed, kv_cache=kv_cache, runtime=runtime),
            TaskRequest(names, limit, num_fewshot, include_path),
            progress=progress,
        )
    render.save_records(records, record)
    render.records_or_json(records, json=json)
    if not json:
        render.task_results(records)
