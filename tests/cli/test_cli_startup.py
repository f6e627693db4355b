"""What the command line does before any work: help, version, wrong usage; and that it is quick about it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llmq import __version__
from llmq.cli.app import app
from llmq.errors import CheckpointError, KernelError, OutputError, SchemeError, UsageError

COMMANDS = [
    ["compare"],
    ["demo"],
    ["matrix"],
    ["quantize"],
    ["plan"],
    ["calibrate"],
    ["sensitivity"],
    ["generate"],
    ["inspect"],
    ["env"],
    ["kernels"],
    ["schemes"],
    ["eval", "perplexity"],
    ["eval", "tasks"],
    ["eval", "layers"],
    ["bench", "tokens-per-second"],
    ["bench", "bandwidth"],
    ["bench", "kernels"],
    ["report", "table"],
    ["report", "diff"],
    ["report", "html"],
    ["report", "plot"],
    ["ci"],
    ["history", "list"],
    ["history", "show"],
    ["history", "plot"],
    ["history", "export"],
    ["history", "import"],
    ["history", "note"],
    ["history", "delete"],
]
HEAVY = {"torch", "numpy", "datasets", "lm_eval", "transformers", "sentencepiece", "tokenizers"}
HEAVY |= {"matplotlib", "jinja2", "sqlite3"}


def loaded_modules(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_llmq_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_modules("import llmq")


@pytest.mark.parametrize("command", [[], ["compare"], ["eval", "perplexity"]], ids=" ".join)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys, contextlib\n"
        f"sys.argv = ['llmq', *{command!r}, '--help']\n"
        "from llmq.cli import main\n"
        "with contextlib.suppress(SystemExit): main()"
    )
    assert not HEAVY & loaded_modules(code)


def test_version_is_quick() -> None:
    command = [sys.executable, "-m", "llmq", "--version"]
    subprocess.run(command, check=True, capture_output=True)  # writes the byte code
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout == f"llmq {__version__}\n"
    assert min(times) < 0.3  # of the processor's time: what else runs here is no fault of the program


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_every_command_is_listed_here() -> None:
    top = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    groups = {
        (group.name, command.name)
        for group in app.registered_groups
        if group.typer_instance
        for command in group.typer_instance.registered_commands
    }
    assert {(name,) for name in top} | groups == {tuple(command) for command in COMMANDS}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["compare"], "Missing argument"),
        (["compare", "x", "--schemes", ""], "no scheme is named"),
        (["compare", "x", "--schemes", "int4-gtpq"], "Did you mean 'int4-gptq'?"),
        (["compare", "x", "--schemes", "int4", "-S", "group=32"], "Did you mean 'group_size'?"),
        (["compare", "x", "--schemes", "int4,int4"], "named twice"),
        (["compare", "x", "--schemes", "int4", "-S", "group_size=48"], "group_size"),
        (["compare", "x", "--schemes", "bf16", "--reference", "bf61"], "Did you mean 'bf16'?"),
        (["quantize", "x", "--scheme", "int4"], "--out"),
        (["eval", "perplexity", "x", "--set", "a=1"], "--scheme"),
        (["eval", "perplexity", "x", "--scheme", "int4", "--set", "group_size"], "KEY=VALUE"),
        (["bench", "tokens-per-second", "x", "--batch-sizes", "1,a"], "--batch-sizes takes positive integers"),
        (["bench", "kernels", "--shapes", "12"], "--shapes takes NxK"),
        (["schemes", "int5"], "unknown scheme 'int5'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_sentence_and_exit_2(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_unknown_device_and_dtype() -> None:
    for option, value in (("--device", "tpu"), ("--dtype", "int8")):
        result = CliRunner().invoke(app, ["eval", "perplexity", "x", option, value])
        assert result.exit_code == 2
        assert value in result.output


def test_an_internal_error_is_a_sentence_and_debug_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the very reason\nwith details")

    monkeypatch.setattr("llmq.api.system.environment", broken)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 1
    assert "internal error (RuntimeError): the very reason." in result.output
    assert "--debug" in result.output
    debugged = CliRunner().invoke(app, ["--debug", "env"])
    assert isinstance(debugged.exception, RuntimeError)


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError, 2), (CheckpointError, 3), (SchemeError, 4), (KernelError, 5), (OutputError, 6)]
)
def test_each_kind_of_error_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: int) -> None:
    def broken(*_: object) -> None:
        raise error("said in one sentence.")

    monkeypatch.setattr("llmq.api.system.environment", broken)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == code
    assert result.output == "error: said in one sentence.\n"


def test_interrupting_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmq.api.system.environment", interrupted)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 130
    assert "interrupted" in result.output
