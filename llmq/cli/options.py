"""The options that several commands share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmq.cli import processes
from llmq.errors import UsageError

if TYPE_CHECKING:
    from llmq.api.calibrating import CalibrationSource
    from llmq.api.loading import Setup
    from llmq.api.recipes import Recipe

RUNNING = "How it runs"
QUANTIZING = "Quantization"
CALIBRATING = "Calibration"
TEXT = "Text and protocol"
OUTPUT = "Output"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint: a folder or file of any known kind, or llmq's own artefact.")
]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.", rich_help_panel=RUNNING)]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute dtype: bf16, fp16 or fp32.", rich_help_panel=RUNNING)]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of a process; default: all cores.", rich_help_panel=RUNNING)
]
Kernel = Annotated[
    str | None,
    typer.Option(
        "--kernel",
        metavar="NAME|fixed|measured",
        help="Use this kernel and no other, or of `llmq kernels` the first that fits (fixed), or the fastest, timed once a "
        "machine (measured). Default: measured on a GPU, else fixed.",
        rich_help_panel=RUNNING,
    ),
]
KvCache = Annotated[
    str,
    typer.Option(
        "--kv-cache",
        metavar="auto|fp32|bf16|fp16|int8",
        help="Dtype of the KV cache; auto is the compute dtype. Quality is measured through it too.",
        rich_help_panel=RUNNING,
    ),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="auto|native|graph|compile|torch",
        help="What runs the forward pass: native is one call of the native library (CPU), graph records the decode step as a "
        "CUDA graph, compile is torch.compile, torch one operator after the other.",
        rich_help_panel=RUNNING,
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations", metavar="bf16|fp32", help="Hidden states between blocks while quantizing.", rich_help_panel=RUNNING
    ),
]
Spill = Annotated[
    str | None,
    typer.Option(
        "--spill",
        metavar="FOLDER|host",
        help="Keep hidden states on this disk; host: in the host's memory. Default: where the model is quantized.",
        rich_help_panel=RUNNING,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.", rich_help_panel=RUNNING)]

Scheme = Annotated[
    str | None,
    typer.Option("--scheme", "-s", help="Scheme to apply after loading; see `llmq schemes`.", rich_help_panel=QUANTIZING),
]
SchemeOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-S",
        "--set",
        metavar="KEY=VALUE",
        help="Option of the scheme, such as group_size=64; repeatable.",
        rich_help_panel=QUANTIZING,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="PATTERN=SCHEME[:KEY=VALUE,…]",
        help="Another scheme for linears whose name matches, such as '*.down_proj=int4:group_size=32'; repeatable.",
        rich_help_panel=QUANTIZING,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip", metavar="PATTERN", help="Leave linears whose name matches unquantized; repeatable.", rich_help_panel=QUANTIZING
    ),
]
SkipUnfit = Annotated[
    bool,
    typer.Option("--skip-unfit", help="Leave linears whose shape does not fit the grid unquantized.", rich_help_panel=QUANTIZING),
]
LmHead = Annotated[bool, typer.Option("--lm-head", help="Quantize the output head too.", rich_help_panel=QUANTIZING)]
Rotate = Annotated[
    str,
    typer.Option(
        "--rotate",
        metavar="auto|none|heads|residual|both",
        help="Rotations to fold into the weights first: of each head's values, of the residual stream, or both (QuaRot); auto: "
        "where the scheme gains by them.",
        rich_help_panel=QUANTIZING,
    ),
]

Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="SOURCE[=WEIGHT]",
        help="Text, JSONL of texts or chats, hf:NAME, or alone a set that `llmq calibrate` recorded; repeatable, with weights. "
        "Default: WikiText-2's training split, else bundled.",
        rich_help_panel=CALIBRATING,
    ),
]
CalibrationColumn = Annotated[
    str, typer.Option("--column", help="Column of the text in rows of a dataset.", rich_help_panel=CALIBRATING)
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        help="Template that chats are rendered with; default: the one beside the tokenizer.",
        rich_help_panel=CALIBRATING,
    ),
]
EvalText = Annotated[
    str | None,
    typer.Option(
        "--eval-text",
        metavar="FILE",
        help="Text that the calibration windows are searched for; default: the one that `llmq eval` takes.",
        rich_help_panel=CALIBRATING,
    ),
]
CalibrationWindows = Annotated[
    int | None,
    typer.Option(
        "--calibration-windows",
        min=1,
        help="Token windows to record; default: 128, or all that the text has.",
        rich_help_panel=CALIBRATING,
    ),
]
CalibrationLength = Annotated[
    int | None,
    typer.Option(
        "--calibration-length", min=8, help="Tokens a window; default: the context, at most 2048.", rich_help_panel=CALIBRATING
    ),
]

Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Evaluation text. Default: WikiText-2's test split, else the bundled text.",
        rich_help_panel=TEXT,
    ),
]
ProtocolName = Annotated[str, typer.Option("--protocol", help="windows, llamacpp or lmeval-word.", rich_help_panel=TEXT)]
Window = Annotated[
    int | None, typer.Option("--window", min=2, help="Tokens a window; default: the context, at most 2048.", rich_help_panel=TEXT)
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Only the first N windows (documents for lmeval-word).", rich_help_panel=TEXT),
]

RecordFile = Annotated[
    Path | None,
    typer.Option("--record", metavar="FILE.jsonl", help="Append the result records to this file.", rich_help_panel=OUTPUT),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result records as JSON instead of tables.", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.", rich_help_panel=OUTPUT)]


def ints(text: str, option: str) -> list[int]:
    """Parse '1,4,16' into positive integers."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UsageError(f"{option} takes positive integers separated by commas, such as 1,4,16; got {text!r}.")
    return values


def names(text: str) -> tuple[str, ...]:
    """Parse 'bf16,int4' into names, without empty ones."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def key_values(pairs: list[str] | None) -> dict[str, str]:
    """Parse ['group_size=64'] into {'group_size': '64'}."""
    parsed: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"-S takes KEY=VALUE, such as group_size=64; got {pair!r}.")
        if key in parsed:
            raise UsageError(f"-S {key} is given twice ({parsed[key]} and {value}); give it once.")
        parsed[key] = value
    return parsed


def setup(
    device: str,
    dtype: str,
    threads: int | None,
    kernel: str | None,
    seed: int = 0,
    *,
    kv_cache: str = "auto",
    runtime: str = "auto",
    several: bool = False,
) -> Setup:
    """Gather the options of the panel 'How it runs'; refuse several processes unless the command shares its work."""
    from llmq.api.loading import Setup

    if not several:
        processes.refuse_several()

    return Setup(device=device, dtype=dtype, threads=threads, kernel=kernel, seed=seed, kv_cache=kv_cache, runtime=runtime)


def spill(text: str | None) -> Path | Literal["host"] | None:
    """Read --spill; a folder that is called host is ./host."""
    return "host" if text == "host" else None if text is None else Path(text)


def recipe(
    scheme: str | None,
    pairs: list[str] | None,
    skip: list[str] | None,
    calibration: CalibrationSource,
    *,
    skip_unfit: bool,
    lm_head: bool,
    overrides: list[str] | None = None,
) -> Recipe | None:
    """Gather the options of the panel 'Quantization'; None when no scheme is asked for."""
    from llmq.api.recipes import Recipe

    if scheme is None:
        if pairs or skip or skip_unfit or lm_head or overrides:
            raise UsageError(
                "-S, --override, --skip, --skip-unfit and --lm-head say how to apply a scheme; name one with --scheme."
            )
        return None
    from llmq.schemes.overrides import Override

    others = tuple(Override.parse(text) for text in overrides or ())
    return Recipe(scheme, key_values(pairs), tuple(skip or ()), skip_unfit, lm_head, calibration, others)


def calibration_source(
    sources: list[str] | None = None,
    windows: int | None = None,
    length: int | None = None,
    *,
    column: str = "text",
    chat_template: str | None = None,
    eval_text: str | None = None,
) -> CalibrationSource:
    """Gather the options of the panel 'Calibration'."""
    from llmq.api.calibrating import CalibrationSource

    return CalibrationSource(tuple(sources or ()), windows, length, column, chat_template, eval_text)
