"""report_screenshots.py: the real script on known records, and the pictures that are in the documents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from report_runs import example_records

from llmq.results.store import append_records

REPO = Path(__file__).parent.parent.parent
SCRIPT = REPO / "scripts" / "report_screenshots.py"


@pytest.mark.slow
@pytest.mark.usefixtures("chromium")
def test_it_photographs_every_view(screenshots: ModuleType, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    append_records(records, example_records())
    command = [sys.executable, SCRIPT, records, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for view in screenshots.VIEWS:
        with Image.open(tmp_path / f"{view.name}.png") as picture:
            assert picture.size == (view.width, view.height)
            inks = picture.convert("RGB").getcolors(1 << 20)
        assert len(inks) > 20  # not an empty screen
        (most, commonest) = max(inks)
        assert (sum(commonest) < 3 * 64) == (view.scheme == "dark")
        assert most < view.width * view.height


def test_without_a_browser_it_says_how_to_get_one(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "make browser" in done.stderr


def test_the_documents_have_every_picture_and_no_other(screenshots: ModuleType) -> None:
    text = (REPO / "docs" / "reports.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[[^\]]+\]\((report-[a-z]+\.png)\)", text))
    assert shown == {f"{view.name}.png" for view in screenshots.VIEWS}
    for name in shown:
        assert (REPO / "docs" / name).stat().st_size <= screenshots.MOST_BYTES
