"""The typer application: its commands, and how each kind of failure ends."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmq import __version__
from llmq.cli import invocation, processes
from llmq.errors import LlmqError

EXIT_CODES = (
    "Exit codes: 0 done · 1 internal error · 2 wrong usage · 3 a file cannot be used · 4 the scheme does not fit the model · "
    "5 a kernel cannot run here · 6 the output exists or cannot be written · 7 another process of several ended · "
    "130 interrupted."
)


# typer brings its own click, or uses the installed one, depending on its version: take the base class from what it exports
_CLICK_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


_ARGUMENTS = "llmq.arguments"
"""Where the context keeps the whole command line."""


class ErrorHandlingGroup(TyperGroup):
    """Ends every command with one sentence and a fitting exit code; `--debug` lets the traceback through."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the arguments before they are taken apart."""
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; translate what it raises."""
        try:
            return super().invoke(ctx)
        except LlmqError as error:
            if ctx.params.get("debug"):
                raise
            _fail(f"{processes.name()}{error}", error.exit_code, speaks=processes.tells(error))
        except KeyboardInterrupt as error:
            _fail("interrupted; nothing half-written was left behind.", 130, speaks=processes.tells(error))
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output has gone (`| head`): nobody to tell
            raise SystemExit(0) from None
        except (_CLICK_ERROR, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            what = str(error).strip().split("\n")[0] or type(error).__name__
            debug = "Run the same with `llmq --debug …` for the traceback."
            _fail(f"{processes.name()}internal error ({type(error).__name__}): {what}. {debug}", 1)


def _fail(message: str, code: int, *, speaks: bool = True) -> None:
    if speaks:
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(message, err=True)
    raise SystemExit(code)


app = typer.Typer(
    cls=ErrorHandlingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure quality: perplexity, divergence from the original, lm-eval tasks.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed: tokens/s, memory bandwidth, single kernels.")
history_app = typer.Typer(no_args_is_help=True, help="Look at past runs, plot, export, import and delete them.")
report_app = typer.Typer(no_args_is_help=True, help="Make tables from stored records.")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llmq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    history: Annotated[
        str | None,
        typer.Option(
            "--history",
            metavar="FILE|off",
            help="Where runs are kept; default: LLMQ_HISTORY, else history.db in your folder for data.",
        ),
    ] = None,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Which quantization of a Llama checkpoint to ship, and what it costs.

    Start with `llmq demo`, then `llmq compare MODEL`.
    """
    ctx.with_resource(invocation.running(ctx.meta[_ARGUMENTS], history))


# Importing a command's module registers it; none of them imports torch before it runs.
from llmq.cli import (  # noqa: E402
    bench,
    ci,
    compare,
    diff,
    evaluate,
    history,
    inspect,
    layers,
    matrix,
    mixing,
    plan,
    quantize,
    report,
    report_html,
    system,
)

_GROUPS = {"eval": eval_app, "bench": bench_app, "report": report_app, "history": history_app}
for name, group in _GROUPS.items():
    app.add_typer(group, name=name)
for register in (
    compare,
    matrix,
    quantize,
    mixing,
    plan,
    inspect,
    evaluate,
    layers,
    bench,
    report,
    report_html,
    diff,
    ci,
    history,
    system,
):
    register.register(app, _GROUPS.get(register.GROUP, app))
