"""A page of known records in a real browser; without one these tests are skipped, and say how to get it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from report_runs import SCHEMES, bandwidth_record, example_run, layers_record

from llmq.api.htmling import write_html
from llmq.results.run import run_in_memory

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "report_screenshots.py"


@pytest.fixture(scope="session")
def screenshots() -> ModuleType:
    """The script that photographs pages, and knows where Chromium is."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def chromium(screenshots: ModuleType) -> str:
    """The system's Chromium: nothing is downloaded."""
    found = screenshots.chromium()
    if found is None:
        pytest.skip("no Chromium on this machine; `make browser` installs it where apt can")
    return str(found)


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    """Chromium, running."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two sections and other records."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    extra = run_in_memory("more.jsonl", [layers_record(), bandwidth_record()])
    write_html([example_run(), example_run("other.jsonl", {"bf16": SCHEMES["bf16"]}, length=512), extra], out, force=False)
    return out


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Callable[..., Page]]:
    """Return a function that opens the page; when the test ends, it must have reached for nothing and complained of nothing."""
    complaints: list[str] = []
    pages: list[Page] = []

    def open_page(width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on(
            "request", lambda request: complaints.append(f"request: {request.url}") if request.url != report.as_uri() else None
        )
        page.goto(report.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []
