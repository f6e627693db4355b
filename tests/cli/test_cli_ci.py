"""`llmq ci`: an unchanged model passes, and each kind of damage fails for its own reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import run_llmq
from safetensors.torch import load_file, save_file

import llmq.benchmark.decode as decode_module
from llmq.api.gate_recipe import read_recipe
from llmq.benchmark.timing import HostStopwatch
from llmq.results.run import read_run
from llmq.results.tolerances import default_tolerances

REPEATS = int(os.environ.get("LLMQ_TEST_REPEATS", "1"))
"""How often an unchanged model is judged in `test_unchanged_runs_raise_no_false_alarm`."""

RECIPE = """
model = "{model}"
baseline = "baseline.jsonl"
threads = 1

[text]
limit = {limit}

[[scheme]]
name = "bf16"

[[scheme]]
name = "int4"
options = {{ group_size = 128 }}

[speed]
prompt_length = 16
new_tokens = 16
repeats = {repeats}

[[speed.pair]]
candidate = "int4"
against = "bf16"
"""
LAYER = "model.layers.1.mlp.down_proj.weight"


def write_recipe(folder: Path, model: Path, *, limit: int = 6, repeats: int = 21) -> Path:
    """Write the recipe that all of these tests judge by."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model, limit=limit, repeats=repeats))
    return recipe


@pytest.fixture(scope="module")
def guarded(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose baseline is written."""
    recipe = write_recipe(tmp_path_factory.mktemp("gate"), short_model)
    run_llmq("ci", recipe, "--update-baseline")
    return recipe


@pytest.fixture(scope="module")
def artefact(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's int4, written by `llmq quantize`."""
    out = tmp_path_factory.mktemp("artefact") / "int4"
    run_llmq("quantize", short_model, "-s", "int4", "-S", "group_size=128", "--threads", 1, "-o", out)
    return out


def damaged(model: Path, folder: Path, damage: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model whose tensors are damaged."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def verdicts(result: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """The findings that `--json` printed, by scheme and metric."""
    found = json.loads(result.stdout)["findings"]
    return {(each["subject"].split()[0], each["metric"]): each for each in found}


@pytest.mark.slow
def test_an_untouched_model_and_its_artefact_are_identical(guarded: Path, artefact: Path, tmp_path: Path) -> None:
    found = verdicts(run_llmq("ci", guarded, "--no-speed", "--json"))
    assert {each["verdict"] for each in found.values()} == {"identical"}
    assert {scheme for scheme, _ in found} == {"bf16", "int4"}
    loaded = verdicts(run_llmq("ci", guarded, "--no-speed", "--model", artefact, "--json"))
    assert {scheme for scheme, _ in loaded} == {"int4"}  # what an artefact cannot be is not missing
    assert loaded["int4", "ln perplexity"]["verdict"] == "identical"


@pytest.mark.slow
def test_a_damaged_scale_fails(guarded: Path, artefact: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.scale"] *= 1.25

    model = damaged(artefact, tmp_path / "scale", damage)
    out = tmp_path / "out"
    said = run_llmq("ci", guarded, "--no-speed", "--model", model, "--out", out, code=1).output
    assert "int4 group_size=128, KL: regression: KL is worse by" in said
    assert "checkpoint_sha256 is" in said
    diff = json.loads((out / "diff.json").read_text())
    failed = {each["metric"] for each in diff["findings"] if each["outcome"] == "fail"}
    assert "KL" in failed
    assert failed <= {"ln perplexity", "KL", "same top-1"}  # and nothing else has changed
    assert 'type="regression"' in (out / "junit.xml").read_text()
    assert (out / "diff.md").read_text().startswith("### ❌ llmq: regression")
    assert "<html" in (out / "report.html").read_text()
    assert read_run(out / "run.jsonl").tokens_of(read_run(out / "run.jsonl").records[0]) is not None


@pytest.mark.slow
def test_a_wrong_zero_point_fails(guarded: Path, artefact: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.zero_point"] += tensors[f"{LAYER}.scale"]  # one step of the grid too high

    model = damaged(artefact, tmp_path / "zero", damage)
    found = verdicts(run_llmq("ci", guarded, "--no-speed", "--model", model, "--json", code=1))
    assert found["int4", "KL"]["verdict"] == "regression"
    assert {each["verdict"] for each in found.values()} - {"regression", "worse, tolerated", "ok"} == {"identical"}
    assert {metric for (_, metric), each in found.items() if each["verdict"] == "identical"} == {"kernels", "size", "bits/weight"}


@pytest.mark.slow
def test_a_damaged_original_fails_in_every_scheme(guarded: Path, short_model: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAYER] *= 0.8

    model = damaged(short_model, tmp_path / "original", damage)
    found = verdicts(run_llmq("ci", guarded, "--no-speed", "--model", model, "--json", code=1))
    # the reference is the recipe's model, so that the damage shows in its own bf16 too
    assert found["bf16", "KL"]["verdict"] == found["int4", "KL"]["verdict"] == "regression"


@pytest.fixture
def processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed in time of this thread on the processor: what else runs on the machine is not counted."""
    monkeypatch.setattr(decode_module, "stopwatch_for", lambda _: HostStopwatch(time.thread_time_ns))


def slowed(share: float) -> Callable[..., Any]:
    """A decode step whose int4 model takes `share` longer, as with a slower kernel."""
    real = decode_module.decode_step
    known: dict[int, bool] = {}

    def step(model: Any, *arguments: Any) -> Any:
        started = time.thread_time_ns()
        result = real(model, *arguments)
        until = started + (1 + share) * (time.thread_time_ns() - started)
        if id(model) not in known:
            known[id(model)] = quantized(model)
        while known[id(model)] and time.thread_time_ns() < until:
            pass
        return result

    return step


def quantized(model: Any) -> bool:
    weights = decode_module.weights_of(model)
    return "Int" in type(weights.model.layers[0].mlp.down_proj.weight.format.weight).__name__


@pytest.mark.slow
@pytest.mark.usefixtures("processor_time")
def test_a_kernel_that_is_a_tenth_slower_fails(short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, short_model, limit=2, repeats=61)
    recipe.write_text(recipe.read_text().replace("[speed]", "[speed]\nattempts = 1"))
    strict = tmp_path / "strict.toml"  # a noise floor of 4 % is usual here, where tests run side by side
    strict.write_text(default_tolerances().read_text().replace("slowdown_percent = 5.0", "slowdown_percent = 3.0"))
    judge = ("ci", recipe, "--tolerances", strict, "--json")
    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "decode_step", slowed(0.0))
        run_llmq("ci", recipe, "--update-baseline")
        same = verdicts(run_llmq(*judge))["int4", "decode speed / bf16"]
        assert same["outcome"] in ("pass", "warn")
        assert same["noise_floor"] is not None
    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "decode_step", slowed(0.12))
        slow = verdicts(run_llmq(*judge, code=1))
    found = slow["int4", "decode speed / bf16"]
    assert (found["verdict"], found["tolerance"]) == ("regression", 3.0)
    assert -15 < found["change"] < -7
    assert "tolerated: 3 % + noise floor" in found["reason"]
    assert {key for key, each in slow.items() if each["outcome"] == "fail"} == {("int4", "decode speed / bf16")}


@pytest.mark.slow
def test_another_tokenizer_is_not_comparable(guarded: Path, short_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "tokenizer"
    shutil.copytree(short_model, model)
    vocabulary = (model / "tokenizer.model").read_bytes()
    the, was = "\u2581the".encode(), "\u2581was".encode()
    assert vocabulary.count(the + b"\x15") == vocabulary.count(was + b"\x15") == 1  # each a piece, followed by its score
    swapped = vocabulary.replace(the + b"\x15", b"<>").replace(was + b"\x15", the + b"\x15").replace(b"<>", was + b"\x15")
    (model / "tokenizer.model").write_bytes(swapped)
    found = verdicts(run_llmq("ci", guarded, "--no-speed", "--model", model, "--json", code=2))
    refused = [each for each in found.values() if each["outcome"] == "incomparable"]
    assert {(each["kind"], each["verdict"]) for each in refused} == {
        ("perplexity", "not comparable"),
        ("divergence", "not comparable"),
    }
    assert all(each["reason"].startswith("tokenizer_sha256 is ") for each in refused)


@pytest.mark.slow
def test_another_text_is_not_comparable(guarded: Path, calibration_text: Path) -> None:
    recipe = guarded.with_name("text.toml")
    recipe.write_text(guarded.read_text().replace("[text]", f'[text]\nfile = "{calibration_text}"'))
    found = verdicts(run_llmq("ci", recipe, "--no-speed", "--json", code=2))
    assert {each["verdict"] for each in found.values()} == {"not comparable"}
    assert all(each["reason"].startswith("text_sha256 is '") for each in found.values())


@pytest.mark.slow
def test_unchanged_runs_raise_no_false_alarm(short_model: Path, tmp_path: Path) -> None:
    """Each in a process of its own, with the clock on the wall; `LLMQ_TEST_REPEATS=30` is what docs/ci.md reports."""
    recipe = write_recipe(tmp_path, short_model, limit=4)
    command = [sys.executable, "-m", "llmq", "--history", "off", "ci", str(recipe)]
    subprocess.run([*command, "--update-baseline"], check=True, capture_output=True)
    codes, attempts = [], 0
    for _ in range(REPEATS):
        run = subprocess.run([*command, "--json"], check=False, capture_output=True, text=True)
        codes.append(run.returncode)
        attempts += "speed was measured" in run.stdout
        assert run.returncode in (0, 1), run.stderr
    print(f"{REPEATS} unchanged runs: {sum(codes)} false alarms, {attempts} measured speed more than once")
    assert codes == [0] * REPEATS


@pytest.mark.slow
def test_a_summary_is_appended_for_github(guarded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    run_llmq("ci", guarded, "--no-speed")
    assert summary.read_text().startswith("before\n### ✅ llmq: fine")


@pytest.mark.slow
def test_a_demanded_ratio_is_judged_on_any_machine(guarded: Path) -> None:
    recipe = guarded.with_name("ratio.toml")
    recipe.write_text(guarded.read_text() + "min_ratio = 1000\n")
    found = verdicts(run_llmq("ci", recipe, "--json", code=1))["int4", "decode speed / bf16"]
    assert (found["verdict"], found["baseline"]) == ("regression", 1000)
    assert found["noise_floor"] is not None


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("[text]", "[txt]", "unknown key txt. Did you mean 'text'?"),
        ("against =", "agains =", "unknown key speed.pair.1.agains. Did you mean 'against'?"),
        ('against = "bf16"', 'against = "bf61"', "names the scheme 'bf61', which is not there. Did you mean 'bf16'?"),
        ('name = "int4"', 'name = "bf16"', "two schemes have the id 'bf16'"),
        ('name = "int4"', 'name = "int5"\nid = "int4"', "unknown scheme 'int5'. Did you mean"),
        ("limit = 6", "limit = 1", "text.limit must be greater than or equal to 2, got 1"),
        ('model = "', 'model = "nowhere/', "does not exist; paths are relative to the recipe"),
        ("baseline.jsonl", "none.jsonl", "--update-baseline` writes it"),
    ],
)
def test_what_could_not_run_says_why_before_it_measures(
    before: str, after: str, says: str, short_model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, short_model)
    (tmp_path / "baseline.jsonl").touch()
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    assert says in " ".join(run_llmq("ci", recipe, code=3).output.split())


@pytest.mark.slow
def test_an_artefact_of_another_scheme_and_a_partial_baseline_are_refused(guarded: Path, int4_artefact: Path) -> None:
    assert "the recipe has" in run_llmq("ci", guarded, "--model", int4_artefact, code=3).output  # of groups of 32
    assert "--no-speed" in run_llmq("ci", guarded, "--update-baseline", "--no-speed", code=3).output


@pytest.mark.slow
def test_updating_replaces_the_baseline_and_its_figures(short_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, short_model, limit=2, repeats=2)
    tokens = tmp_path / "baseline.tokens"
    tokens.mkdir()
    (tmp_path / "baseline.jsonl").write_text("damaged")
    (tokens / "of-an-earlier-one.safetensors").write_bytes(b"")
    run_llmq("ci", recipe, "--update-baseline")
    run = read_run(tmp_path / "baseline.jsonl")
    assert {path.name for path in tokens.iterdir()} == {
        f"{r.tokens_sha256[:32]}.safetensors" for r in run.records if r.tokens_sha256
    }
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.toml", "baseline.jsonl", "baseline.tokens"}


def test_the_shipped_recipe_and_its_baseline_agree() -> None:
    configs = Path(__file__).parents[2] / "configs"
    recipe, paths = read_recipe(configs / "recipes" / "wt2-8m.toml")
    run = read_run(paths.baseline)
    expected = {(entry.name, entry.options.get("group_size")) for entry in recipe.scheme}
    assert {(record.subject.scheme, record.subject.options.get("group_size")) for record in run.records} == expected
    assert all(run.tokens_of(record) is not None for record in run.records if record.kind in ("perplexity", "divergence"))
    assert {record.environment.threads for record in run.records} == {recipe.threads}
    beside = paths.baseline.with_suffix(".tokens")
    assert paths.baseline.stat().st_size + sum(each.stat().st_size for each in beside.iterdir()) < 1_000_000
