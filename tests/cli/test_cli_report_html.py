"""`llmq report html` and `llmq report plot` on files of records."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import run_llmq
from report_runs import bandwidth_record, example_records, layers_record

from llmq.results.plots import plots_of
from llmq.results.store import append_records


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    append_records(path, example_records())
    return path


def test_html_writes_one_page_and_nothing_else(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "report.html"
    result = run_llmq("report", "html", records, "-o", out)
    assert str(out) in result.stdout
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_html_replaces_nothing_without_force(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    assert "--force" in run_llmq("report", "html", records, "-o", out, code=6).output
    assert out.read_text() == "mine"
    run_llmq("report", "html", records, "-o", out, "--force")
    assert out.read_text() != "mine"


@pytest.mark.slow
def test_html_puts_protocols_apart(records: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    append_records(other, example_records(length=512))
    out = tmp_path / "report.html"
    run_llmq("report", "html", records, other, "-o", out)
    assert "Not to be compared with section 1: its records of perplexity have length 512" in out.read_text()


def test_html_names_what_cannot_be_read(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    missing = run_llmq("report", "html", tmp_path / "recrods.jsonl", "-o", out, code=3).output
    assert "Did you mean" in missing
    records.write_text(records.read_text() + "{half a rec")
    assert "line 17 is not JSON" in run_llmq("report", "html", records, "-o", out, code=3).output
    records.write_text("")
    assert "there is no record in" in run_llmq("report", "html", records, "-o", out, code=2).output
    assert not out.exists()


def test_plot_writes_a_folder_and_tells_which(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "plots"
    result = run_llmq("report", "plot", records, "-o", out, "--which", "size,kl")
    names = ["kl.png", "kl.svg", "size.png", "size.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(name in result.stdout for name in names)


def test_plot_keeps_what_else_is_in_the_folder(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "plots"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "size.png").write_text("mine")
    refused = run_llmq("report", "plot", records, "-o", out, "--which", "size", code=6).output
    assert "size.png exists already" in refused
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "size.png"]
    run_llmq("report", "plot", records, "-o", out, "--which", "size", "--force")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "size.png").read_bytes().startswith(b"\x89PNG")


def test_plot_writes_one_file_of_one_plot(records: Path, tmp_path: Path) -> None:
    for name, start in (("front.png", b"\x89PNG"), ("front.SVG", b"<?xml")):
        run_llmq("report", "plot", records, "-o", tmp_path / name, "--which", "speed")
        assert (tmp_path / name).read_bytes().startswith(start)
    several = run_llmq("report", "plot", records, "-o", tmp_path / "all.png", code=2).output
    assert "all.png holds one plot, and there are 7: size, speed, kl" in several
    assert not (tmp_path / "all.png").exists()


def test_plot_suggests_a_name_and_says_when_there_is_nothing(records: Path, tmp_path: Path) -> None:
    unknown = run_llmq("report", "plot", records, "-o", tmp_path / "out", "--which", "sise", code=2).output
    assert "there is no plot 'sise' of these records. Did you mean 'size'?" in unknown
    machine = tmp_path / "machine.jsonl"
    append_records(machine, [bandwidth_record()])
    assert "there is nothing to plot in" in run_llmq("report", "plot", machine, "-o", tmp_path / "out", code=2).output
    assert not (tmp_path / "out").exists()


def test_plots_of_runs_that_must_not_be_compared_have_numbers(records: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    append_records(other, example_records(length=512))
    run_llmq("report", "plot", records, other, "-o", tmp_path / "plots", "--which", "size")
    assert sorted(path.stem for path in (tmp_path / "plots").glob("*.svg")) == ["1-size", "2-size"]


def test_every_plot_is_named_in_the_help() -> None:
    shown = " ".join(run_llmq("report", "plot", "--help").output.replace("│", " ").split())
    for plot in plots_of([*example_records(), layers_record()]):
        assert plot.name in shown, plot.name
