"""Float8 as a user does it: quantize, inspect, evaluate, time; alone, as a part of another scheme, and as a candidate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import records_of, run_llmq
from shortening import LAYERS

SMALL = ("--window", 64, "--limit", 2)


@pytest.mark.parametrize("scheme", ["float8-weight-only", "float8-dynamic"])
def test_quantize_inspect_evaluate(short_model: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"
    run_llmq("quantize", short_model, "-s", scheme, "-o", out)
    facts = json.loads(run_llmq("inspect", out, "--verify", "--json").stdout)
    assert 8.0 < facts["matrix_bits_per_weight"] < 8.2
    assert {"float8_e4m3fn"} <= {row["dtype"] for row in facts["dtypes"]}
    arguments = ("eval", "perplexity", out, "--reference", short_model, *SMALL, "--json")
    perplexity, divergence = records_of(run_llmq(*arguments))
    assert perplexity["kernels"]["dequant-gemm"] == 7 * LAYERS
    assert 0 < divergence["metrics"]["kl_mean"]["value"] < 0.1


def test_options_are_checked(short_model: Path, tmp_path: Path) -> None:
    done = run_llmq("quantize", short_model, "-s", "float8-dynamic", "-S", "granularity=group", "-o", tmp_path / "out", code=2)
    assert "option granularity of scheme float8-dynamic must be 'row' or 'tensor', got 'group'." in done.output
    assert not (tmp_path / "out").exists()
    done = run_llmq("quantize", short_model, "-s", "float8-weight-only", "-S", "granularity=row", "-o", tmp_path / "out", code=2)
    assert "It has no options." in done.output


@pytest.mark.slow
def test_goes_with_schemes_that_calibrate(short_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    small = ("--calibration", calibration_text, "--calibration-windows", 2, "--calibration-length", 32)
    overrides = ("--override", "*.down_proj=float8-dynamic", "--override", "*.v_proj=float8-weight-only")
    for number, scheme in enumerate(("int4-gptq", "int4-awq", "int8-smoothquant")):
        out = tmp_path / str(number)
        run_llmq("quantize", short_model, "-s", scheme, *overrides, *small, "-o", out)
        formats = json.loads((out / "llmq.json").read_text())["formats"]
        assert formats["model.layers.0.mlp.down_proj"]["activation"] == {"kind": "float8", "granularity": "row", "eps": 1e-12}
        assert formats["model.layers.0.self_attn.v_proj"]["weight"] == {"kind": "float8", "scale_dtype": "bfloat16"}
        assert formats["model.layers.0.mlp.up_proj"]["weight"]["kind"] == "int"


@pytest.mark.slow
def test_is_a_candidate_where_loss_is_explained(short_model: Path, tmp_path: Path) -> None:
    candidates = ("--candidate", "float8-weight-only", "--candidate", "float8-dynamic")
    done = run_llmq("eval", "layers", short_model, "-s", "int4", *candidates, "--windows", 2, "--window", 64, "--top", 1)
    assert "=float8-weight-only'" in done.output  # the same bytes but for the scales, and nothing lost in the inputs
    record = tmp_path / "kernels.jsonl"
    run_llmq("bench", "kernels", "--only", "float8-weight-only,float8-dynamic", "--shapes", "64x64", "--rows", "1,3",
             "--record", record)  # fmt: skip
    timed = [json.loads(line) for line in record.read_text().splitlines()]
    kernels = [(each["protocol"]["params"]["format"], *each["kernels"]) for each in timed if each["kind"] == "kernel"]
    assert ("float8-dynamic", "dequant-gemm") in kernels
