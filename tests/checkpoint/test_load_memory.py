"""Loading never holds the weights twice: measured, pages of mapped files included."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_writers import CONFIG, Writer

BIG = replace(CONFIG, vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_layers=8, num_heads=16, head_dim=64)
MEASURE = """
import json, sys
from pathlib import Path
import torch
from llmq.checkpoint import load_model, open_checkpoint
from llmq.checkpoint.complete import empty_model

def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
empty_model(checkpoint.config)
torch.aminmax(torch.ones(1 << 20, dtype=torch.bfloat16))  # the thread pool
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
model = load_model(checkpoint, dtype=torch.bfloat16)
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": memory("VmHWM") - before, "after": memory("VmRSS") - before}))
"""

CASES: dict[str, tuple[torch.dtype, Callable[[Writer], Path]]] = {
    "as stored": (torch.bfloat16, lambda w: w.hf()),
    "q and k permuted": (torch.bfloat16, lambda w: w.meta()),
    "two shards joined": (torch.bfloat16, lambda w: w.meta(shards=2)),
    "cast from fp32": (torch.float32, lambda w: w.hf()),
    "cast from fp32, permuted": (torch.float32, lambda w: w.llama2c(version=1)),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("name", CASES)
def test_peak_memory(tmp_path: Path, name: str) -> None:
    dtype, write = CASES[name]
    path = write(Writer(tmp_path, BIG, dtype))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, timeout=120)
    measured = json.loads(run.stdout)
    assert measured["weights"] > 200e6
    assert measured["peak"] < 1.3 * measured["weights"], {key: round(value / 1e6) for key, value in measured.items()}
