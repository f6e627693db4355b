"""`llmq sensitivity`, and the options with which `llmq quantize` takes a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.cli import options as o
from llmq.cli import processes
from llmq.errors import UsageError

if TYPE_CHECKING:
    from llmq.api.loading import Setup
    from llmq.api.mixing import Mixture, Target
    from llmq.api.recipes import Recipe
    from llmq.progress import Progress

GROUP = ""
MIXING = "Mixed precision"

TargetBits = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        metavar="BITS",
        help="Choose a scheme for each linear, so that all take at most this many bits a weight, scales included.",
        rich_help_panel=MIXING,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size", metavar="SIZE", help="The same for the size of the whole file, such as 4GB.", rich_help_panel=MIXING
    ),
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="Sensitivities to solve the budget from; measured and written there when there is no such file.",
        rich_help_panel=MIXING,
    ),
]
Candidates = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate",
        metavar="SCHEME[:KEY=VALUE,…]",
        help="A scheme to choose from; repeatable. Default: the scheme at 3 and 4 bits, groups of 32, 64 and 128, and int8.",
        rich_help_panel=MIXING,
    ),
]


def register(app: typer.Typer, _: typer.Typer) -> None:
    """Add the command."""
    app.command("sensitivity")(sensitivity)


def sensitivity(
    model: o.Model,
    scheme: Annotated[
        str,
        typer.Option("--scheme", "-s", help="Scheme whose algorithm the candidates use.", rich_help_panel=o.QUANTIZING),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.json).", rich_help_panel=o.OUTPUT)],
    option: o.SchemeOptions = None,
    candidate: Candidates = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="measured|fisher",
            help="Run the model with each linear quantized, or predict from Fisher factors. Default: fisher where the scheme "
            "needs factors anyway.",
            rich_help_panel=MIXING,
        ),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            "--held-out", min=1, help="Calibration windows kept back, to measure divergences on.", rich_help_panel=MIXING
        ),
    ] = 8,
    skip: o.Skip = None,
    skip_unfit: o.SkipUnfit = False,
    lm_head: o.LmHead = False,
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    calibration_length: o.CalibrationLength = None,
    column: o.CalibrationColumn = "text",
    chat_template: o.ChatTemplate = None,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    seed: o.Seed = 0,
    force: o.Force = False,
) -> None:
    """Measure what each linear costs the model under each candidate, for `llmq quantize --target-bpw --sensitivity FILE`."""
    from llmq.api.sensing import SensitivityRequest, measure_sensitivity
    from llmq.cli import render
    from llmq.files import check_absent

    check_absent(out, force=force)
    source = o.calibration_source(
        calibration, calibration_windows, calibration_length, column=column, chat_template=chat_template
    )
    recipe = o.recipe(scheme, option, skip, source, skip_unfit=skip_unfit, lm_head=lm_head)
    assert recipe is not None
    request = SensitivityRequest(tuple(candidate or ()), method, held_out)
    with render.reporting() as progress:
        table = measure_sensitivity(model, recipe, o.setup(device, "fp32", threads, None, seed), request, progress=progress)
    table.save(out, force=force)
    render.sensitivities(table, out)


def target_of(bits: float | None, size: str | None, file: Path | None, candidates: list[str] | None) -> Target | None:
    """Gather the budget; None when there is none."""
    from llmq.api.mixing import Target, parse_size

    if bits is None and size is None:
        if file is not None or candidates:
            raise UsageError("--sensitivity and --candidate are for a budget; give one with --target-bpw or --target-size.")
        return None
    return Target(bits, None if size is None else parse_size(size))


def mix(
    model: str, recipe: Recipe, setup: Setup, what: tuple[Target, Path | None, list[str] | None], *, progress: Progress
) -> Mixture:
    """Solve a budget from a file of sensitivities, or from ones that are measured now.

    Args:
        model: the checkpoint.
        recipe: the scheme, and what it is for.
        setup: where it runs.
        what: the budget, the file, and the candidates to measure.
        progress: hears of the measurement.
    """
    from llmq.api.mixing import solve_mixture
    from llmq.api.sensing import SensitivityRequest, measure_sensitivity, read_sensitivity

    target, file, candidates = what
    if file is not None and file.exists():
        if candidates:
            raise UsageError(f"{file} was measured for candidates of its own; leave --candidate out, or name another file.")
        table = read_sensitivity(model, file)
    else:
        if processes.size() > 1:
            raise UsageError("sensitivities are measured by one process; run `llmq sensitivity` first, and name its file here.")
        table = measure_sensitivity(model, recipe, setup, SensitivityRequest(tuple(candidates or ())), progress=progress)
        if file is not None:
            table.save(file)
    mixture = solve_mixture(model, recipe, setup, table, target)
    progress.note(mixture.sentence())
    return mixture
