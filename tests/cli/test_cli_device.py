"""`--device` of the commands that quantize, on a machine without a GPU: plans and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runs import run_llmq

STATES = "hidden states of the calibration windows"
PLAN = ("-s", "int4-gptq", "--calibration-windows", 64, "--device", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(wt2_8m: Path, tmp_path: Path) -> None:
    failed = run_llmq("quantize", wt2_8m, "-s", "int4", "--device", "cuda", "-o", tmp_path / "out", code=2)
    assert "torch sees no CUDA device" in failed.output
    failed = run_llmq("sensitivity", wt2_8m, "-s", "int4", "--device", "cuda", "-o", tmp_path / "out", code=2)
    assert "torch sees no CUDA device" in failed.output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_is_refused(wt2_8m: Path) -> None:
    assert (
        "unknown device 'gpu'; allowed are cpu and cuda"
        in run_llmq("plan", wt2_8m, "-s", "int4", "--device", "gpu", code=2).output
    )


def test_a_plan_for_a_gpu_counts_both_memories(wt2_8m: Path) -> None:
    assert "Memory of the GPU" in run_llmq("plan", wt2_8m, *PLAN).output
    plans = {
        place: json.loads(run_llmq("plan", wt2_8m, *PLAN, *(("--spill", place) if place else ()), "--json").stdout)
        for place in ("", "host", "/nowhere")
    }
    assert STATES in plans[""]["device_parts"]
    assert STATES not in plans["host"]["device_parts"]
    assert "the block in fp32" not in plans[""]["peak_parts"]
    assert plans["host"]["peak_parts"][STATES] == plans[""]["device_parts"][STATES]
    assert STATES not in plans["/nowhere"]["peak_parts"]
    on_cpu = json.loads(run_llmq("plan", wt2_8m, *PLAN[:-2], "--spill", "host", "--json").stdout)
    assert on_cpu["device_parts"] is None
    assert STATES in on_cpu["peak_parts"]
