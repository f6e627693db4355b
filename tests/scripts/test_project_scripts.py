"""The project's own scripts: documents are fresh, the results can be measured anew, set-up reads the right list."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmq.results.store import read_records

REPO = Path(__file__).parent.parent.parent
SCRIPTS = REPO / "scripts"


def run_script(name: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, SCRIPTS / name, *arguments], capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_generated_documents_are_fresh() -> None:
    run_script("docs.py", "--check")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The documents, the records they are made of, and the script that makes them."""
    copy = tmp_path / "repo"
    for folder in ("scripts", "docs", "configs"):
        (copy / folder).mkdir(parents=True)
    for path in [SCRIPTS / "docs.py", REPO / "README.md", *(REPO / "docs").glob("*.md"), *(REPO / "configs").rglob("*.jsonl")]:
        target = copy / path.relative_to(REPO)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for folder in ("peers", "quality"):
        shutil.copytree(SCRIPTS / folder, copy / "scripts" / folder)
    for plot in (REPO / "docs").glob("*.svg"):
        shutil.copy(plot, copy / "docs")
    return copy


def test_records_without_a_table_are_named(copy: Path) -> None:
    known = copy / "configs" / "baselines" / "wt2-8m-g32.jsonl"
    (known.parent / "orphan.jsonl").write_bytes(known.read_bytes())
    lost = subprocess.run([sys.executable, copy / "scripts" / "docs.py", "--check"], capture_output=True, text=True, check=False)
    assert lost.returncode == 1
    assert "no document has a line '<!-- begin orphan -->' for the table of orphan.jsonl" in " ".join(lost.stderr.split())


@pytest.mark.slow
def test_a_stale_document_is_named(copy: Path) -> None:
    reference = copy / "docs" / "cli.md"
    reference.write_text(reference.read_text() + "typed by hand\n")
    command = [sys.executable, copy / "scripts" / "docs.py"]
    stale = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert stale.returncode == 1
    assert "docs/cli.md" in stale.stderr
    subprocess.run(command, check=True, capture_output=True)
    assert reference.read_text() == (REPO / "docs" / "cli.md").read_text()


def test_dev_requirements_are_those_of_pyproject() -> None:
    words = run_script("dev_requirements.py").stdout.split()
    assert any(word.startswith("pytest>=") for word in words)
    assert any(word.startswith("transformers>=") for word in words)


def test_the_constraints_pin_everything_that_is_depended_on() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (REPO / "configs" / "constraints.txt").read_text().split("\n")
    }
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {requirement.split(">=")[0].strip().lower().replace("_", "-") for requirement in needed}
    assert names <= pinned


@pytest.mark.slow
def test_results_are_measured_whole(tmp_path: Path) -> None:
    run_script("measure_results.py", "--limit", "2", "--groups", "32", "--kv-caches", "bf16,int8", "--out", str(tmp_path))
    records = read_records(tmp_path / "wt2-8m-g32.jsonl")
    assert {record.kind for record in records} == {"perplexity", "divergence", "prefill", "decode"}
    assert len({record.subject.scheme for record in records}) == 6
    assert {record.subject.kv_cache.dtype for record in records if record.subject.kv_cache} == {"bf16"}
    for dtype in ("bf16", "fp32"):
        caches = read_records(tmp_path / f"wt2-8m-kv-{dtype}.jsonl")
        assert [(record.kind, record.subject.kv_cache and record.subject.kv_cache.dtype) for record in caches] == [
            ("perplexity", "bf16"),
            ("divergence", "bf16"),
            ("perplexity", "int8"),
            ("divergence", "int8"),
        ]
        assert {record.subject.scheme for record in caches} == {dtype}
        assert {record.protocol.params["reference_dtype"] for record in caches if record.kind == "divergence"} == {dtype}
    names = ["wt2-8m-g32.jsonl", "wt2-8m-kv-bf16.jsonl", "wt2-8m-kv-fp32.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
