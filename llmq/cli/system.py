"""`llmq env`, `llmq kernels` and `llmq schemes`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options as o

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


def kernels(json: o.Json = False) -> None:
    """List the kernels: which can run here, for what, and why the others cannot."""
    from llmq.api.system import kernel_list
    from llmq.cli import render

    render.kernels(kernel_list(), json=json)


def schemes(
    name: Annotated[str | None, typer.Argument(help="Show this scheme's options.")] = None,
    json: o.Json = False,
) -> None:
    """List the schemes, or one scheme's options."""
    from llmq.api.system import scheme_list
    from llmq.cli import render

    render.schemes(scheme_list(name), json=json)
