"""`llmq inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options as o

GROUP = ""


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


def inspect(
    model: o.Model,
    layers: Annotated[bool, typer.Option("--layers", help="List every tensor.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights: hashes as recorded, no NaN, shapes as configured.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Explain any checkpoint: kind, shape, tokenizer, size, and for llmq's own how it was quantized."""
    from llmq.api.inspecting import describe_checkpoint
    from llmq.cli import render

    with render.reporting(quiet=json) as progress:
        description = describe_checkpoint(model, verify=verify, progress=progress)
    render.description(description, layers=layers, json=json)
