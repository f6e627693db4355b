"""Photograph the report of the README's records in Chromium, for docs/reports.md.

    python scripts/report_screenshots.py

Run it after `scripts/measure_results.py`. The pictures are of the records, so no figure in them is typed. `make browser` installs
Chromium.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmq.errors import OutputError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REPO = Path(__file__).resolve().parent.parent
RECORDS = [REPO / "configs" / "baselines" / name for name in ("wt2-8m-g32.jsonl", "wt2-8m-g128.jsonl")]
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MOST_BYTES = 300_000


@dataclass(frozen=True)
class View:
    """One picture: what is in it, how large the screen is, and how dark."""

    name: str
    width: int
    height: int
    scheme: Literal["light", "dark"]
    at: str = "body"
    """CSS selector of what is at the top of the screen."""


VIEWS = (
    View("report-table", 1440, 860, "light"),
    View("report-plots", 1280, 1100, "dark", ".plots"),
    View("report-phone", 390, 844, "light", "h2"),
)


def chromium() -> str | None:
    """Return the path of the system's Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


def main(
    records: Annotated[list[Path] | None, typer.Argument(metavar="FILE.jsonl…", help="Default: the README's.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the pictures.")] = REPO / "docs",
) -> None:
    """Write the page to a temporary folder, and its pictures to `out`."""
    from playwright.sync_api import sync_playwright

    from llmq.api.htmling import write_html
    from llmq.results.run import Run, read_run

    found = chromium()
    if found is None:
        raise OutputError("there is no Chromium to photograph pages with; `make browser` installs it where apt can.")
    read = (read_run(path) for path in records or RECORDS)
    runs = [Run(Path(run.name).name, run.records, run.tokens_of) for run in read]  # no path of this machine in a picture
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "report.html"
        write_html(runs, page, force=False)
        browser = playwright.chromium.launch(executable_path=found)
        for view in VIEWS:
            picture = photograph(browser, page, view)
            path = out / f"{view.name}.png"
            path.write_bytes(picture)
            typer.echo(f"{path} ({len(picture) / 1e3:.0f} kB)")
        browser.close()


def photograph(browser: Browser, page: Path, view: View) -> bytes:
    """Return a PNG of what one screen shows."""
    opened = browser.new_page(viewport={"width": view.width, "height": view.height}, color_scheme=view.scheme)
    opened.goto(page.as_uri())
    opened.evaluate("selector => scrollTo(0, document.querySelector(selector).getBoundingClientRect().top - 16)", view.at)
    picture = opened.screenshot()
    opened.close()
    if len(picture) > MOST_BYTES:
        raise OutputError(f"{view.name}.png would take {len(picture):,} bytes, {MOST_BYTES:,} at most; make the view smaller.")
    return picture


if __name__ == "__main__":
    typer.run(main)
