"""Measure the tables of the README anew: the bundled checkpoint at group sizes 32 and 128, a file of records each.

    python scripts/measure_results.py && python scripts/docs.py

Uses the text that `llmq compare` uses by default, so set LLMQ_WIKITEXT_DIR for WikiText-2. A file is replaced when its
measurement is complete, and not before. Run it on a machine that does nothing else: speed is measured too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmq.cli.compare import DEFAULT_SCHEMES
from llmq.files import atomic_path

REPO = Path(__file__).resolve().parent.parent
BASELINES = REPO / "configs" / "baselines"
MODEL = REPO / "llmq" / "assets" / "wt2-8m"


def main(
    limit: Annotated[int, typer.Option("--limit", min=1, help="Windows of the text, from its start.")] = 400,
    groups: Annotated[str, typer.Option("--groups", metavar="A,B,…", help="Group sizes.")] = "32,128",
    out: Annotated[Path, typer.Option("--out", help="Folder of the records.")] = BASELINES,
) -> None:
    """Compare the schemes at each group size and store the records."""
    from llmq.api.comparing import CompareRequest, compare_schemes
    from llmq.api.evaluating import Question
    from llmq.cli import render
    from llmq.results.store import append_records

    for group in groups.split(","):
        request = CompareRequest(
            model=str(MODEL),
            schemes=DEFAULT_SCHEMES.split(","),
            options={"group_size": group.strip()},
            question=Question(limit=limit),
        )
        with render.reporting() as progress:
            comparison = compare_schemes(request, progress=progress)
        render.comparison(comparison)
        with atomic_path(out / f"wt2-8m-g{group.strip()}.jsonl", force=True) as path:
            append_records(path, comparison.records)


if __name__ == "__main__":
    typer.run(main)
