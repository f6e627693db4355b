"""`llmq env`, `llmq kernels` and `llmq schemes`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options as o
from llmq.errors import UsageError

GROUP = ""


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the commands."""
    app.command("env")(env)
    app.command("kernels")(kernels)
    app.command("schemes")(schemes)


def env(threads: o.Threads = None, json: o.Json = False) -> None:
    """Show what this machine and installation offer, and what is missing and why."""
    from llmq.api.system import environment
    from llmq.cli import render

    render.environment(environment(threads), json=json)


def kernels(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Show what the linears of this checkpoint get, and why.")
    ] = None,
    scheme: o.Scheme = None,
    option: o.SchemeOptions = None,
    dtype: o.Dtype = "bf16",
    device: o.Device = "cpu",
    threads: o.Threads = None,
    kernel: o.Kernel = None,
    json: o.Json = False,
) -> None:
    """List the kernels: which can run here, for what, and why the others cannot; or choose them for a model.

    With --kernel measured, or on a GPU, kernels that no run has timed here yet are timed, and their times kept.
    """
    from llmq.api.loading import open_model
    from llmq.api.system import kernel_list
    from llmq.cli import render

    if model is None:
        if scheme or option or kernel:
            raise UsageError("--scheme, -S and --kernel ask what a model's linears get; name the model.")
        render.kernels(kernel_list(), json=json)
        return
    recipe = o.recipe(scheme, option, None, o.calibration_source(), skip_unfit=False, lm_head=False)
    with render.reporting(quiet=json) as progress:
        loaded = open_model(model, recipe, o.setup(device, dtype, threads, kernel), progress=progress)
    render.kernel_choices(loaded.choices, json=json)


def schemes(
    name: Annotated[str | None, typer.Argument(help="Show this scheme's options.")] = None,
    json: o.Json = False,
) -> None:
    """List the schemes, or one scheme's options."""
    from llmq.api.system import scheme_list
    from llmq.cli import render

    render.schemes(scheme_list(name), json=json)
