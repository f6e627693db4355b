"""Measure the tables of the README anew on the bundled checkpoint: schemes at group sizes 32 and 128, and KV caches.

    python scripts/measure_results.py && python scripts/docs.py

Each table has a file of records, which is replaced when its measurement is complete, and not before. The text is what
`llmq compare` uses by default, so set LLMQ_WIKITEXT_DIR for WikiText-2. Run it on a machine that does nothing else: the speed of
the schemes is measured too. KV caches are measured for quality and memory only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.cli.compare import DEFAULT_SCHEMES
from llmq.cli.options import names
from llmq.files import atomic_path

if TYPE_CHECKING:
    from llmq.api.comparing import CompareRequest

REPO = Path(__file__).resolve().parent.parent
BASELINES = REPO / "configs" / "baselines"
MODEL = REPO / "llmq" / "assets" / "wt2-8m"


def main(
    limit: Annotated[int, typer.Option("--limit", min=1, help="Windows of the text, from its start.")] = 400,
    groups: Annotated[str, typer.Option("--groups", metavar="A,B,…", help="Group sizes of the schemes; '' for none.")] = "32,128",
    kv_caches: Annotated[
        str, typer.Option("--kv-caches", metavar="A,B,…", help="KV caches of the model in bf16 and in fp32; '' for none.")
    ] = "fp32,bf16,int8",
    out: Annotated[Path, typer.Option("--out", help="Folder of the records.")] = BASELINES,
) -> None:
    """Compare the schemes at each group size, then the KV caches, and store the records."""
    from llmq.api.comparing import CompareRequest
    from llmq.api.evaluating import Question

    model, question = str(MODEL), Question(limit=limit)
    for group in names(groups):
        schemes, options = list(names(DEFAULT_SCHEMES)), {"group_size": group}
        measure(CompareRequest(model, schemes, options, question=question), out / f"wt2-8m-g{group}.jsonl")
    for dtype in ("bf16", "fp32") if names(kv_caches) else ():
        request = CompareRequest(model, [dtype], question=question, reference=dtype, bench=None, kv_caches=names(kv_caches))
        measure(request, out / f"wt2-8m-kv-{dtype}.jsonl", dtype)


def measure(request: CompareRequest, path: Path, dtype: str = "bf16") -> None:
    """Compare in a compute dtype, show the table, and replace the file `path` with the records."""
    from llmq.api.comparing import compare_schemes
    from llmq.api.loading import Setup
    from llmq.cli import render
    from llmq.results.store import append_records

    with render.reporting() as progress:
        comparison = compare_schemes(request, Setup(dtype=dtype), progress=progress)
    render.comparison(comparison)
    with atomic_path(path, force=True) as temporary:
        append_records(temporary, [record.without_tokens() for record in comparison.records])  # a megabyte each


if __name__ == "__main__":
    typer.run(main)
