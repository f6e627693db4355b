"""`llmq report diff`: what it writes, and that its exit code is its verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cli_runs import run_llmq

from llmq.results.record import ResultRecord
from llmq.results.store import append_records, tokens_path

sys.path.append(str(Path(__file__).parents[1] / "results"))
from gate_runs import decode, quality, tokens


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of records: a baseline, the same again, a worse one and one of another text."""
    runs: dict[str, list[ResultRecord]] = {
        "base": [*quality(tokens()), decode()],
        "same": [*quality(tokens()), decode()],
        "worse": [*quality(tokens(worse=0.1)), decode()],
        "other": [*quality(tokens(), text_sha256="e" * 64), decode()],
    }
    for name, records in runs.items():
        append_records(tmp_path / f"{name}.jsonl", records)
    return {name: tmp_path / f"{name}.jsonl" for name in runs}


def test_exit_codes_are_verdicts(files: dict[str, Path], tmp_path: Path) -> None:
    base = files["base"]
    assert "fine: 7 passed" in run_llmq("report", "diff", base, files["same"]).output.replace("\n", " ")
    failed = run_llmq("report", "diff", base, files["worse"], code=1).output
    assert "ln perplexity is worse by" in failed
    assert "regression: 1 failed" in failed
    assert "text_sha256 is 'ffff" in run_llmq("report", "diff", base, files["other"], code=2).output
    assert "none.jsonl" in run_llmq("report", "diff", base, tmp_path / "none.jsonl", code=3).output
    bad = tmp_path / "bad.toml"
    bad.write_text("[qualty]\n")
    unknown = run_llmq("report", "diff", base, files["same"], "--tolerances", bad, code=3)
    assert "Did you mean 'quality'?" in unknown.output
    assert "No such option" in run_llmq("report", "diff", base, files["same"], "--nonsense", code=3).output
    run_llmq("report", "diff", base, code=3)


def test_damaged_files_could_not_run(files: dict[str, Path]) -> None:
    figures = quality(tokens())[0].tokens_sha256
    assert figures is not None
    beside = tokens_path(files["base"], figures)
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-1] + b"\0\0")
    assert "was changed" in run_llmq("report", "diff", files["base"], files["worse"], code=3).output
    beside.unlink()
    assert "copy the folder along" in run_llmq("report", "diff", files["base"], files["worse"], code=3).output
    beside.write_bytes(whole)
    files["worse"].write_text(files["worse"].read_text()[:-40])
    assert "is not JSON" in run_llmq("report", "diff", files["base"], files["worse"], code=3).output


def test_outputs(files: dict[str, Path], tmp_path: Path) -> None:
    pair = (files["base"], files["worse"])
    found = json.loads(run_llmq("report", "diff", *pair, "--json", code=1).stdout)
    assert (found["schema_version"], found["result"]) == (1, "regression")
    assert {"subject", "metric", "verdict", "reason", "low", "high", "tolerance", "noise_floor"} <= set(found["findings"][0])
    markdown = run_llmq("report", "diff", *pair, "--markdown", code=1).stdout
    written = ("--output", tmp_path / "diff.md", "--junit", tmp_path / "junit.xml")
    run_llmq("report", "diff", *pair, *written, code=1)
    assert (tmp_path / "diff.md").read_text().strip() == markdown.strip()
    assert 'failures="1"' in (tmp_path / "junit.xml").read_text()
    assert "--force" in run_llmq("report", "diff", *pair, *written, code=3).output
    run_llmq("report", "diff", *pair, *written, "--force", code=1)


def test_help_documents_the_exit_codes() -> None:
    said = " ".join(run_llmq("report", "diff", "--help").output.split())
    assert "0 fine · 1 regression · 2 not comparable" in said
    assert "3 could not run" in said
