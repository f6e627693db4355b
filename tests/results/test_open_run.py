"""Runs by name: files go before history, and every miss says what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import made, tokens

from llmq.api.runs import open_run
from llmq.errors import InputError, UsageError
from llmq.results.history import open_history
from llmq.results.store import append_records


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "history.db"
    monkeypatch.setenv("LLMQ_HISTORY", str(path))
    monkeypatch.chdir(tmp_path)
    with open_history(path, create=True) as opened:
        opened.save([made("bf16").with_tokens(tokens())], command="")
    return path


def test_runs_of_files_and_of_history(history: Path, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    append_records(file, [made("int4").with_tokens(tokens(seed=3)), made("fp16")])
    run = open_run(str(file))
    assert (run.name, [record.subject.scheme for record in run.records]) == (str(file), ["int4", "fp16"])
    assert run.tokens_of(run.records[0]).sha256 == tokens(seed=3).sha256
    stored = open_run("latest")
    assert [record.subject.scheme for record in stored.records] == ["bf16"]
    assert stored.tokens_of(stored.records[0]).sha256 == tokens().sha256
    for spec in (stored.name, stored.name[:4], str(history)):
        assert open_run(spec).records == stored.records


def test_a_file_goes_before_a_run_and_its_content_says_what_it_is(history: Path, tmp_path: Path) -> None:
    append_records(tmp_path / "latest", [made("int4")])
    assert [record.subject.scheme for record in open_run("latest").records] == ["int4"]
    (tmp_path / "records").write_bytes(history.read_bytes())
    assert [record.subject.scheme for record in open_run("records").records] == ["bf16"]


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("run.jsonl", InputError, r"no file run\.jsonl.* Did you mean runs\.jsonl\?"),
        ("below/runs.jsonl", InputError, r"no file below/runs\.jsonl"),
        ("lastest", InputError, r"no file lastest.* Did you mean latest\?"),
        ("ffff", UsageError, "no run 'ffff' in history"),
        ("latest~1", UsageError, "before the first of 1 runs"),
        (".", UsageError, r"is a folder; name a file of records in it, such as runs\.jsonl"),
    ],
)
def test_names_of_nothing(history: Path, tmp_path: Path, spec: str, error: type[Exception], said: str) -> None:
    append_records(tmp_path / "runs.jsonl", [made()])
    with pytest.raises(error, match=said):
        open_run(spec)


def test_a_database_of_several_runs_and_no_history(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_history(history, create=True) as opened:
        opened.save([made()], command="")
    with pytest.raises(UsageError, match=r"holds 2 runs; name one of them by its id, with `llmq --history "):
        open_run(str(history))
    monkeypatch.setenv("LLMQ_HISTORY", "off")
    with pytest.raises(UsageError, match="history is off"):
        open_run("latest")
