"""`llmq matrix`: every cell once, killed and gone on to the same figures, and folders that are another's."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import run_llmq
from jobs import SAMPLE, finish, start, stop_when

from llmq.api.comparing import measure_quality
from llmq.results.record import ResultRecord
from llmq.results.store import read_records, read_tokens

KILLS = int(os.environ.get("LLMQ_TEST_KILLS", "1"))
"""How many random moments are tried; more for a release."""
CELLS = 5


@pytest.fixture(scope="session")
def recipe(short_model: Path, made_once: Callable[..., Path]) -> Path:
    """A recipe of five small cells: the reference, int4, and int4-gptq on two sets, one of them with two seeds' worth."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "recipe.toml").write_text(f"""
            model = "{short_model}"
            schemes = ["int4", {{ name = "int4-gptq", options = {{ sweeps = 0 }} }}]
            group_sizes = [128]
            seeds = [3, 4, 5]

            [text]
            file = "text.txt"
            window = 64
            limit = 2

            [[calibration]]
            name = "few"
            sources = ["{SAMPLE / "calibration.txt"}"]
            windows = 4
            length = 64
        """)
        (folder / "text.txt").write_text((SAMPLE / "evaluation.txt").read_text())

    return made_once("matrix-recipe", write) / "recipe.toml"


def figures(out: Path) -> dict[str, Any]:
    """What a matrix found, by cell and kind, with the hash of every token's figures; and that those are there."""
    path = out / "runs.jsonl"
    found = {}
    for record in read_records(path):
        assert read_tokens(path, record) is not None
        metrics = {name: metric.value for name, metric in record.metrics.items()}
        key = (record.subject.scheme, json.dumps(record.subject.options, sort_keys=True), record.kind)
        assert key not in found
        found[key] = (metrics, record.tokens_sha256)
    return found


def finished(out: Path) -> int:
    """How many cells are finished."""
    path = out / "runs.jsonl"
    return len(path.read_text().splitlines()) // 2 if path.exists() else 0


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, made_once: Callable[..., Path]) -> Path:
    """A matrix that nobody disturbed."""

    def measure(out: Path) -> None:
        run_llmq("matrix", recipe, "-o", out, "--threads", 1)

    return made_once("matrix-undisturbed", measure)


@pytest.mark.slow
def test_the_table_and_the_records(recipe: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_HISTORY", str(tmp_path / "history.db"))
    assert len(figures(undisturbed)) == 2 * CELLS
    assert len(list((undisturbed / "calibration").iterdir())) == 3
    again = run_llmq("matrix", recipe, "-o", undisturbed, "--threads", 1)
    assert "going on after 5 of 5 cells" in again.stderr
    assert "5 distinct cells, the reference among them, for 6 combinations" in again.stderr
    assert "5 cells in 3 rows" in again.stdout
    assert "llmq report html" in again.stdout
    for _ in range(2):  # the second time they are in history already
        data = json.loads(run_llmq("matrix", recipe, "-o", undisturbed, "--threads", 1, "--json").stdout)
    assert [row["label"] for row in data["rows"]] == ["bf16", "int4 group_size=128", "int4-gptq group_size=128"]
    joined = data["rows"][2]
    assert (joined["seeds"], joined["calibration"]) == ([3, 4, 5], "few")
    kl = [
        record["metrics"]["kl_mean"]["value"]
        for record in data["records"]
        if record["kind"] == "divergence" and record["subject"]["scheme"] == "int4-gptq"
    ]
    assert len(set(kl)) == 3  # the seeds draw other windows
    assert joined["metrics"]["kl_mean"]["value"] == pytest.approx(sum(kl) / 3, rel=1e-6)
    single = data["rows"][1]["metrics"]
    assert single["kl_mean"]["spread"] is None
    by_kind = {record["kind"]: record["metrics"] for record in data["records"] if record["subject"]["scheme"] == "int4"}
    for name in ("kl_mean", "delta_ln_perplexity", "top1_agreement"):  # what is joined of one seed is what was measured
        stored = by_kind["divergence"][name]
        assert single[name]["value"] == pytest.approx(stored["value"], rel=1e-5, abs=1e-7)
        assert single[name]["stderr"] == pytest.approx(stored["stderr"], rel=1e-4)
    assert data["rows"][0]["pareto"] == ["size"]
    runs = json.loads(run_llmq("history", "list", "--json").stdout)["runs"]
    assert [(run["records"], run["kinds"]) for run in runs] == [(10, ["perplexity", "divergence"])]
    run_llmq("report", "table", undisturbed / "runs.jsonl")


@pytest.mark.slow
def test_a_matrix_killed_between_and_within_cells_goes_on_there(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("matrix", recipe, "-o", out, "--threads", 1)
    assert stop_when(process, lambda: finished(out) >= 3)
    finish(process, code=-signal.SIGKILL)
    before = (out / "runs.jsonl").read_bytes()
    done = finished(out)
    assert 3 <= done < CELLS
    result = run_llmq("matrix", recipe, "-o", out, "--threads", 1)
    assert f"going on after {done} of {CELLS} cells" in result.stderr
    assert (out / "runs.jsonl").read_bytes().startswith(before)  # what was finished stays as it was
    assert figures(out) == figures(undisturbed)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    names = {path.name: path.read_bytes() for path in (out / "calibration").iterdir()}
    assert names == {path.name: path.read_bytes() for path in (undisturbed / "calibration").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_matrix_killed_at_a_random_moment_ends_with_the_same_figures(
    recipe: Path, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out"
    moment = random.Random(number)
    process = start("matrix", recipe, "-o", out, "--threads", 1)
    after, more = moment.randrange(CELLS - 1), moment.uniform(0, 1)
    assert stop_when(process, lambda: out.exists() and finished(out) >= after and (time.sleep(more) or True))
    finish(process, code=-signal.SIGKILL)
    run_llmq("matrix", recipe, "-o", out, "--threads", 1)
    assert figures(out) == figures(undisturbed)


@pytest.mark.slow
def test_interrupting_says_how_to_go_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def measure(*arguments: object) -> list[ResultRecord]:
        if finished(out) == 1:
            raise KeyboardInterrupt
        return measure_quality(*arguments)

    monkeypatch.setattr("llmq.api.matrix.measure_quality", measure)
    said = run_llmq("matrix", recipe, "-o", out, "--threads", 1, code=130).stderr
    assert "1 of 5 cells are finished in" in said
    assert "the same command goes on there" in said


@pytest.mark.slow
def test_folders_of_another_matrix(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    other = recipe.with_name("other.toml")
    other.write_text(recipe.read_text().replace("limit = 2", "limit = 1").replace("windows = 4", "windows = 5"))
    before = (undisturbed / "runs.jsonl").read_bytes()
    refused = run_llmq("matrix", other, "-o", undisturbed, "--threads", 1, code=2).output
    assert "recipe.text.limit was 2, is 1" in refused
    assert "recipe.calibration.1.windows was 4, is 5" in refused
    assert "--restart" in refused
    text = recipe.with_name("text.txt")
    whole = text.read_text()
    text.write_text(whole + "More.")
    assert "text_sha256 was" in run_llmq("matrix", recipe, "-o", undisturbed, "--threads", 1, code=2).output
    text.write_text(whole)
    assert "threads was 1, is 2" in run_llmq("matrix", recipe, "-o", undisturbed, "--threads", 2, code=2).output
    assert (undisturbed / "runs.jsonl").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds notes.txt, and no matrix" in run_llmq("matrix", recipe, "-o", tmp_path, code=6).output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_does_not_fit_is_said_before_anything_is_measured(recipe: Path, tmp_path: Path) -> None:
    bad = recipe.with_name("unfit.toml")
    bad.write_text('skip = ["no_such_linear"]\n' + recipe.read_text())
    said = run_llmq("matrix", bad, "-o", tmp_path / "out", "--threads", 1, code=2).output
    assert "no_such_linear" in said
    assert not (tmp_path / "out" / "runs.jsonl").exists()
