"""Check llmq on a GPU in at most eight minutes: is every kernel right, how fast is it, and what share of the wall is that?

    python scripts/gpu_check.py --out gpu.jsonl
    python scripts/gpu_check.py --report gpu.jsonl

Needs torch 2.11 or newer, triton, safetensors, sentencepiece, typer, rich and numpy, and no installation of llmq: it finds the
package beside itself. `quantize`, which compares artefacts made on the GPU and on the CPU, needs all that llmq depends on, and is
left out without it. What is left out for want of time, packages or hardware is said in the tables; docs/gpu.md explains them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "scripts")]

import torch  # noqa: E402
import typer  # noqa: E402
from gpu.findings import Finding, read_findings, say, write_records  # noqa: E402
from gpu.table import show  # noqa: E402
from gpu.walls import ceilings  # noqa: E402

from llmq.errors import LlmqError, UsageError, suggest  # noqa: E402

PARTS = ("verify", "walls", "kernels", "model", "block", "quantize")
SHARES = {"verify": 0.25, "walls": 0.05, "kernels": 0.25, "model": 0.35, "block": 0.05, "quantize": 0.05}
"""Of the time, in this order; what a part does not use is the next one's."""


def main(
    out: Annotated[Path | None, typer.Option("--out", help="Write the records here.")] = None,
    parts: Annotated[str, typer.Option("--parts", metavar="A,B,…", help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="Begin nothing new after so long.")] = 7.0,
    device: Annotated[str, typer.Option("--device", help="cuda; cpu tries the script itself, with --small.")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="Small shapes, to try the script: its figures mean nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the records.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Only show the table of these records.")] = None,
) -> None:
    """Verify kernels, then measure ceilings, kernels, a 7 B model and GPTQ; print one table. Exit code 1: something is wrong."""
    try:
        if report is not None:
            found, where = read_findings(report)
            show(found, where["device"])
            return
        chosen = _chosen(parts)
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                "torch sees no CUDA device here; run this on a machine with an NVIDIA GPU (--device cpu --small tries it)."
            )
        if out is not None and out.exists() and not force:
            raise UsageError(f"{out} exists already; name another file, or add --force.")
        found = []
        try:
            for finding in run(chosen, device, minutes * 60, small=small):
                found.append(finding)
                if out is not None and finding.part != "verify":
                    write_records(out, found, device, force=True)  # as it goes: a machine that is lent may be taken back
        finally:
            if out is not None and found:
                write_records(out, found, device, force=True)
            show(found, torch.cuda.get_device_name() if device == "cuda" else device)
        if any(finding.wrong for finding in found):
            raise typer.Exit(1)
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


def run(parts: tuple[str, ...], device: str, seconds: float, *, small: bool) -> Iterator[Finding]:
    """Yield what the parts find, in their order."""
    started, walls = time.monotonic(), list[Finding]()
    due = 0.0
    for part in parts:
        due += SHARES[part] / sum(SHARES[each] for each in parts)
        say(f"{part}: from {time.monotonic() - started:.0f} s on, until {due * seconds:.0f} s at the latest")
        for finding in _part(part, device, walls, started + due * seconds, small=small):
            if part == "walls":
                walls.append(finding)
            if finding.wrong:
                say(f"  WRONG: {finding.what}, {finding.who}: {finding.wrong}")
            yield finding


def _part(part: str, device: str, walls: list[Finding], until: float, *, small: bool) -> Iterator[Finding]:
    """Yield what one part finds; its code is imported when it begins."""
    known = ceilings(walls)
    if part == "verify":
        from gpu.verify import verify, verify_attention

        yield from verify_attention(device, small=small)
        yield from verify(device, small=small, until=until)
    elif part == "walls":
        from gpu.walls import measure_walls

        yield from measure_walls(device, small=small)
    elif part == "kernels":
        from gpu.kernel_times import time_kernels

        yield from time_kernels(device, known, small=small, until=until)
    elif part == "model":
        from gpu.model_speed import time_models

        yield from time_models(device, known, small=small, until=until)
    elif part == "block":
        from gpu.block import round_block

        yield from round_block(device, small=small, until=until)
    else:
        from gpu.both import quantize_on_both

        yield from quantize_on_both(device, until=until)


def _chosen(text: str) -> tuple[str, ...]:
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    for part in wanted:
        if part not in PARTS:
            raise UsageError(f"unknown part {part!r}.{suggest(part, list(PARTS))}")
    if not wanted:
        raise UsageError(f"no part was named; choose of {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in wanted)


if __name__ == "__main__":
    typer.run(main)
