"""`llmq history`, and what the commands that measure leave in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import records_of, run_llmq

from llmq.results.run import read_run

QUICK = ("--limit", 1, "--window", 32, "--threads", 1)


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "data" / "history.db"
    monkeypatch.setenv("LLMQ_HISTORY", str(path))
    return path


def listed(*arguments: object) -> list[dict[str, object]]:
    runs: list[dict[str, object]] = json.loads(run_llmq("history", "list", "--json", *arguments).stdout)["runs"]
    return runs


@pytest.mark.slow
def test_a_run_goes_through_history_and_back(short_model: Path, evaluation_text: Path, history: Path, tmp_path: Path) -> None:
    text = ("--text", evaluation_text)
    assert "history has no such runs" in run_llmq("history", "list").stdout
    assert not history.exists()
    measured = run_llmq("compare", short_model, "--schemes", "bf16,int4", "--no-bench", *QUICK, *text)
    assert "is in history" in measured.stderr
    (run,) = listed()
    assert run["command"].startswith(f"llmq compare {short_model} --schemes bf16,int4 --no-bench --limit 1")
    assert (run["schemes"], run["kinds"], run["records"]) == (["bf16", "int4"], ["perplexity", "divergence"], 4)
    shown = run_llmq("history", "show", run["id"][:6])
    for said in ("int4 group_size=", "KL (nats/token)", "windows v1", "packages", "runtime:", str(run["command"])):
        assert said in shown.stdout
    run_llmq("history", "note", "latest", "before the change")
    assert "before the change" in run_llmq("history", "list").stdout

    out = tmp_path / "out.jsonl"
    assert "4 records" in run_llmq("history", "export", "latest", "latest~0", "-o", out).stdout
    assert "--force" in run_llmq("history", "export", "latest", "-o", out, code=6).output
    exported = read_run(out)
    assert all(exported.tokens_of(record) is not None for record in exported.records)
    assert [record.model_dump(mode="json") for record in exported.records] == records_of(
        run_llmq("history", "show", "latest", "--json")
    )
    assert "0 records imported, 4 were there already" in run_llmq("history", "import", out).stdout
    other = ("--history", tmp_path / "other.db")
    assert "4 records imported as run" in run_llmq(*other, "history", "import", out, "--note", "theirs").stdout
    assert "theirs" in run_llmq(*other, "history", "list").stdout
    assert len(listed()) == 1  # --history was for that command alone

    picture = tmp_path / "kl.svg"
    assert "2 figures of 2 series" in run_llmq("history", "plot", "kl_mean", "-o", picture).stdout
    assert "int4" in picture.read_text()
    assert "1 figures of 1 series" in run_llmq("history", "plot", "kl_mean", "-s", "int4", "-o", picture, "--force").stdout
    assert "--yes" in run_llmq("history", "delete", "latest", code=2).output
    assert "4 records of llmq compare" in run_llmq("history", "delete", "latest", "--yes").stdout
    assert listed() == []
    run_llmq("history", "show", "latest", code=2)


@pytest.mark.slow
def test_import_says_which_token_figures_are_lost(
    tmp_path: Path, history: Path, short_model: Path, evaluation_text: Path
) -> None:
    out = tmp_path / "run.jsonl"
    arguments = ("eval", "perplexity", short_model, *QUICK, "--text", evaluation_text, "--record", out)
    run_llmq("--history", "off", *arguments)
    assert not history.exists()
    (tmp_path / "run.tokens").rename(tmp_path / "elsewhere")
    assert "the token figures of 1 records are not beside it" in run_llmq("history", "import", out).stdout
    assert "does not hold the token figures" in run_llmq("history", "export", "latest", "-o", tmp_path / "x.jsonl", code=3).output
    assert not (tmp_path / "x.jsonl").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run.tokens")
    run_llmq("history", "import", out)
    run_llmq("history", "export", "latest", "-o", tmp_path / "x.jsonl")


@pytest.mark.slow
def test_a_history_that_cannot_be_written_costs_no_result(
    short_model: Path, evaluation_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMQ_HISTORY", str(tmp_path))  # a folder
    out = tmp_path / "run.jsonl"
    done = run_llmq("eval", "perplexity", short_model, *QUICK, "--text", evaluation_text, "--record", out)
    assert "note: this run was not kept in history: cannot use history" in done.stderr
    assert "perplexity" in done.stdout
    assert len(read_run(out).records) == 1


def test_history_that_is_off_is_said() -> None:
    assert "history is off" in run_llmq("--history", "off", "history", "list", code=2).output
