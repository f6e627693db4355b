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
import json, sys
from llmq.cli import main
sys.argv = ["llmq", *json.loads(sys.argv[1])]
try:
    main()
finally:
    # ru_maxrss would begin at the size of the process that this one was forked from
    status = open("/proc/self/status").read()
    sys.stderr.write(f"\\npeak {int(status.split('VmHWM:')[1].split()[0]) * 1024}")
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


def _process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which says its peak at the end."""
    command = [sys.executable, "-c", PEAK, json.dumps([str(argument) for argument in arguments])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "arguments"),
    [
        (("--hidden-size=2048", "--intermediate-size=5632", "--heads=32", "--kv-heads=4"), ("-s", "int4", "-S", "search=range")),
        (
            ("--hidden-size=768", "--intermediate-size=4096", "--heads=12", "--kv-heads=12"),
            ("-s", "int4-gptq", "-S", "sweeps=1", "--calibration-windows", 8, "--calibration-length", 256),
        ),
    ],
    ids=["data-free", "calibrated"],
)
def test_the_peak_of_wider_models_is_as_planned(
    wt2_8m: Path, calibration_text: Path, tmp_path: Path, widths: tuple[str, ...], arguments: tuple[object, ...]
) -> None:
    model = tmp_path / "model"
    maker = Path(__file__).parents[2] / "scripts" / "make_random_checkpoint.py"
    shape = (*widths, "--layers=1", "--vocab-size=4096")
    subprocess.run([sys.executable, maker, model, *shape, "--tokenizer-from", wt2_8m], check=True, capture_output=True)
    words = (model, *arguments, *(("--calibration", calibration_text) if "int4-gptq" in arguments else ()), "--threads", 1)
    planned = json.loads(_process("plan", *words, "--json").stdout)
    done = _process("quantize", *words, "-o", tmp_path / "out", "--json")
    peak = int(done.stderr.rsplit("peak ", 1)[1])
    assert 0.85 * peak < planned["peak_bytes"] < 1.15 * peak, planned["peak_parts"]


@pytest.mark.slow
def test_size_time_and_memory_are_as_planned(wt2_8m: Path, calibration_text: Path, tmp_path: Path) -> None:
    arguments = [str(wt2_8m), "-s", "int4-gptq", "--calibration", str(calibration_text), "--calibration-windows", "16"]
    planned = json.loads(_process("plan", *arguments, "--measure", "--json").stdout)
    started = time.perf_counter()
    _process("plan", *arguments, "--json")
    start_up = time.perf_counter() - started  # of a program that then does nothing; on a busy machine longer than this job
    started = time.perf_counter()
    done = _process("quantize", *arguments, "-o", tmp_path / "out", "--json")
    seconds = time.perf_counter() - started - start_up
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert planned["total_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    # a model of this size is smaller than the libraries: what is left over must be theirs
    peak = int(done.stderr.rsplit("peak ", 1)[1])
    assert 0.7 * planned["peak_bytes"] < peak < 1.3 * planned["peak_bytes"]
    # other programs share the machine that runs this: a factor, where a quiet machine gives some per cent
    assert seconds / 4 < planned["seconds"]["total"] < 4 * max(seconds, start_up)
