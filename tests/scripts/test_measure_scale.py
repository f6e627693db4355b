"""scripts/measure_scale.py: its page is fresh, its rows are found, and a record takes the place of an older one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmq.errors import InputError, UsageError
from llmq.results.store import read_records

REPO = Path(__file__).parents[2]
SCRIPTS = REPO / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("measure_scale", SCRIPTS / "measure_scale.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def test_the_page_is_fresh(script: ModuleType) -> None:
    from scale.page import page_text

    assert page_text(REPO) == (REPO / "docs" / "scale.md").read_text(encoding="utf-8"), "run scripts/measure_scale.py --report"


def test_cases_have_names_of_their_own_and_unknown_ones_are_refused(script: ModuleType) -> None:
    names = [case.name for case in script.CASES]
    assert len(set(names)) == len(names)
    assert not any("," in name for name in names)
    assert [case.name for case in script.choose(["7B-2*"])] == [name for name in names if name.startswith("7B-2")]
    with pytest.raises(UsageError, match="no case matches '70B'"):
        script.choose(["70B"])


def test_a_record_replaces_that_of_its_case(script: ModuleType, tmp_path: Path) -> None:
    records = read_records(REPO / "configs" / "scale" / "plan.jsonl")
    path = tmp_path / "plan.jsonl"
    for record in reversed(records):
        script.put(path, record)
    script.put(path, records[0])
    cases = [record.subject.options["case"] for record in read_records(path)]
    assert cases == [record.subject.options["case"] for record in records]  # the catalogue's order


def test_the_peak_is_that_of_the_process_alone(script: ModuleType, tmp_path: Path) -> None:
    from scale.running import run_measured

    (tmp_path / "empty.py").write_text("print('here')")
    (tmp_path / "filled.py").write_text("import sys\nx = bytearray(b'1' * (50_000_000 + len(sys.argv)))")  # and its copy
    (tmp_path / "broken.py").write_text("print('so it goes')\nraise SystemExit(3)")
    environment = {"PYTHONPATH": str(tmp_path)}
    empty, filled = (run_measured(module, [], environment) for module in ("empty", "filled"))
    assert empty.output.strip() == "here"
    assert empty.peak_bytes < 50_000_000  # less than the process that started it
    assert 80_000_000 < filled.peak_bytes - empty.peak_bytes < 120_000_000
    with pytest.raises(InputError, match="`broken a` ended with 3: so it goes"):
        run_measured("broken", ["a"], environment)
