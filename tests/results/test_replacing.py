"""Replacing a file of records: whole, with its token figures, and with nothing left over."""

from __future__ import annotations

from pathlib import Path

import pytest
from gate_runs import decode, quality, tokens

from llmq.errors import OutputError
from llmq.results.replacing import replace_records
from llmq.results.run import read_run
from llmq.results.store import append_records


def test_the_new_records_and_their_figures_alone_are_there(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_records(path, [*quality(tokens()), decode()])
    replace_records(path, quality(tokens(worse=1)))
    run = read_run(path)
    figures = run.tokens_of(run.records[0])
    assert figures is not None
    assert figures.sha256 == tokens(worse=1).sha256
    assert len(run.records) == 2
    assert len(list((tmp_path / "runs.tokens").iterdir())) == 1
    assert {each.name for each in tmp_path.iterdir()} == {"runs.jsonl", "runs.tokens"}


def test_records_without_figures_leave_no_figures(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    replace_records(path, quality(tokens()))
    replace_records(path, [decode()])
    assert [record.kind for record in read_run(path).records] == ["decode"]
    assert list((path.parent / "runs.tokens").iterdir()) == []


def test_a_failure_leaves_the_old_file_and_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    replace_records(path, quality(tokens()))
    broken = decode()
    metric = broken.metrics["tokens_per_s"].model_copy(update={"value": float("nan")})
    with pytest.raises(OutputError):
        replace_records(path, [*quality(tokens(worse=1)), broken.model_copy(update={"metrics": {"tokens_per_s": metric}})])
    run = read_run(path)
    figures = run.tokens_of(run.records[0])
    assert figures is not None
    assert figures.sha256 == tokens().sha256
    assert {each.name for each in tmp_path.iterdir()} == {"runs.jsonl", "runs.tokens"}
