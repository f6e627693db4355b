"""Artefacts that the GPU and the CPU make of the bundled model: do they agree within the tolerances that are stated?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpu.findings import Finding

MODEL = Path(__file__).resolve().parents[2] / "llmq" / "assets" / "wt2-8m"
SCHEMES = ("int4", "int4-gptq", "int8-smoothquant", "int4-awq", "int4-yaqa")


def quantize_on_both(device: str, *, until: float) -> Iterator[Finding]:
    """Yield a finding for each scheme: the largest share of codes that differ, and what is beyond its tolerance."""
    try:
        from gpu.quantizing import quantize_both
        from llmq.api.calibrating import CalibrationSource
    except ImportError as missing:
        yield Finding("quantize", "GPU against CPU", "–", note=f"left out: {missing.name} is not installed")
        return
    for scheme in SCHEMES:
        if time.monotonic() > until:
            yield Finding("quantize", f"{scheme}: codes that differ", "GPU against CPU", note="left out: no time was left")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = CalibrationSource(windows=8, length=128)
            found = quantize_both(MODEL, scheme, {}, source, Path(folder), device=device)
        more = {} if found.memory is None else {"memory_over_predicted": (found.memory, "1")}
        worst = max(found.codes.values(), default=0.0)
        what = f"{scheme}: largest share of codes that differ in a linear"
        yield Finding("quantize", what, "GPU against CPU", worst, "1", wrong="; ".join(found.broken()), more=more)
