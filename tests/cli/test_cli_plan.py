"""`llmq plan`: what it predicts is what then happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import run_llmq
from safetensors.torch import load_file

PEAK = """
import json, resource, sys
from llmq.cli import main
sys.argv = ["llmq", *json.loads(sys.argv[1])]
try:
    main()
finally:
    sys.stderr.write(f"\\npeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}")
"""


def test_a_plan_is_a_table_and_json(wt2_8m: Path) -> None:
    shown = run_llmq("plan", wt2_8m, "-s", "int4-gptq", "--calibration-windows", 4).output
    assert "together, about" in shown
    assert "No weight was read" in shown
    planned = json.loads(run_llmq("plan", wt2_8m, "-s", "int4-gptq", "--calibration-windows", 4, "--json").stdout)
    assert planned["peak_bytes"] == sum(planned["peak_parts"].values())
    assert planned["peak_parts"]["hidden states of the calibration windows"] % (4 * 256 * 256 * 2) == 0
    assert planned["seconds"] is None
    spilled = run_llmq("plan", wt2_8m, "-s", "int4-gptq", "--spill", "/nowhere", "--json").stdout
    assert "hidden states of the calibration windows" not in json.loads(spilled)["peak_parts"]


def test_a_plan_counts_what_overrides_change(wt2_8m: Path) -> None:
    plain = json.loads(run_llmq("plan", wt2_8m, "-s", "int4", "--json").stdout)
    arguments = ("plan", wt2_8m, "-s", "int4", "--override", "*.down_proj=int8-weight-only", "--json")
    mixed = json.loads(run_llmq(*arguments).stdout)
    assert mixed["total_bytes"] > plain["total_bytes"]
    assert {row["target"] for row in mixed["weights"] if row["fqn"].endswith("down_proj")} == {"int8 per channel symmetric"}


@pytest.mark.slow
def test_size_time_and_memory_are_as_planned(wt2_8m: Path, calibration_text: Path, tmp_path: Path) -> None:
    arguments = [str(wt2_8m), "-s", "int4-gptq", "--calibration", str(calibration_text), "--calibration-windows", "16"]
    planned = json.loads(run_llmq("plan", *arguments, "--measure", "--json").stdout)
    command = ["quantize", *arguments, "-o", str(tmp_path / "out"), "--json"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps(command)], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    seconds = time.perf_counter() - started
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert planned["total_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    # a model of this size is smaller than the libraries: what is left over must be theirs
    peak = int(done.stderr.rsplit("peak ", 1)[1])
    assert 0.7 * planned["peak_bytes"] < peak < 1.3 * planned["peak_bytes"]
    # other programs share the machine that runs this: a factor, where a quiet machine gives some per cent
    assert seconds / 4 < planned["seconds"]["total"] < 4 * seconds
