"""`llmq bench tokens-per-second`, `bandwidth` and `kernels`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options as o
from llmq.errors import UsageError

GROUP = "bench"


def register(_: typer.Typer, group: typer.Typer) -> None:
    """Add the commands."""
    group.command("tokens-per-second")(tokens_per_second)
    group.command("bandwidth")(bandwidth)
    group.command("kernels")(kernels)


def tokens_per_second(
    model: o.Model,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", metavar="A,B,…", help="Sequences decoded together.")] = "1",
    prompt_lengths: Annotated[str, typer.Option("--prompt-lengths", metavar="A,B,…", help="Tokens of the prompt.")] = "128",
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts", metavar="A,B,…", help="Tokens already in the KV cache where decoding is timed; default: the prompt."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens decoded in one repeat.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Repeats of each timing.")] = 5,
    compile: Annotated[bool, typer.Option("--compile", help="The same as --runtime compile.", rich_help_panel=o.RUNNING)] = False,
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
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Measure prefill and decode apart: tokens/s, time to first token, time per token, bandwidth, memory."""
    from llmq.api.benching import bench_tokens
    from llmq.benchmark.speed import BenchPlan
    from llmq.cli import render

    recipe = o.recipe(scheme, option, skip, o.calibration_source(), skip_unfit=skip_unfit, lm_head=lm_head)
    plan = BenchPlan(
        batch_sizes=tuple(o.ints(batch_sizes, "--batch-sizes")),
        prompt_lengths=tuple(o.ints(prompt_lengths, "--prompt-lengths")),
        contexts=tuple(o.ints(contexts, "--contexts")) if contexts else None,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    if compile:
        if runtime not in ("auto", "compile"):
            raise UsageError(f"--compile is --runtime compile, and --runtime {runtime} was asked for too; leave one out.")
        runtime = "compile"
    with render.reporting(quiet=json) as progress:
        setup = o.setup(device, dtype, threads, kernel, kv_cache=kv_cache, runtime=runtime)
        records = bench_tokens(model, recipe, setup, plan, progress=progress)
    render.save_records(records, record)
    render.records_or_json(records, json=json)
    if not json:
        render.speed(records)


def bandwidth(
    device: o.Device = "cpu",
    threads: o.Threads = None,
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Measure this machine's sequential read bandwidth and matmul peak: the walls that the other figures are shares of."""
    from llmq.api.benching import bench_machine
    from llmq.cli import render

    with render.reporting(quiet=json) as progress:
        result = bench_machine(o.setup(device, "bf16", threads, None), progress=progress)
    render.save_records([result], record)
    render.records_or_json([result], json=json)
    if not json:
        render.bandwidth(result)


def kernels(
    shapes: Annotated[
        str | None, typer.Option("--shapes", metavar="NxK,…", help="Weights to time: 2048x2048,5632x2048, or of 1.1b, 7b, 8b.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Time the shapes of this checkpoint instead.")] = None,
    rows: Annotated[str, typer.Option("--rows", metavar="A,B,…", help="Rows of activations (tokens).")] = "1,4,16,128",
    only: Annotated[str | None, typer.Option("--only", metavar="SCHEME,…", help="Only the kernels of these schemes.")] = None,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    record: o.RecordFile = None,
    json: o.Json = False,
) -> None:
    """Time every kernel that can run here, after checking it against the reference."""
    from llmq.api.benching import KernelRequest, bench_all_kernels
    from llmq.cli import render

    request = KernelRequest(
        shapes, model, tuple(o.ints(rows, "--rows")), tuple(name.strip() for name in only.split(",")) if only else None
    )
    with render.reporting(quiet=json) as progress:
        records = bench_all_kernels(request, o.setup(device, dtype, threads, None), progress=progress)
    render.save_records(records, record)
    render.records_or_json(records, json=json)
    if not json:
        render.kernel_speeds(records)
