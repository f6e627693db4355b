"""`llmq kernels MODEL` and `--kernel measured`: what is chosen, why, and that it is measured once."""

from __future__ import annotations

import json

import pytest
from cli_runs import records_of, run_llmq

from llmq.benchmark import choosing
from llmq.benchmark.timing import TimingPlan


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choosing, "_TIMING", TimingPlan(repeats=1, warmup=0))


def test_the_fixed_choice_of_a_model(short_model, tmp_path):
    text = run_llmq("kernels", short_model, "-s", "int8-dynamic").stdout
    assert "model.layers.*.mlp.down_proj" in text
    assert "the first that fits" in text
    choices = json.loads(run_llmq("kernels", short_model, "-s", "int8-dynamic", "--kernel", "dequant-gemm", "--json").stdout)
    assert {choice["why"] for choice in choices if choice["fqn"] != "lm_head.weight"} == {"it was asked for"}
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_measured_choice_is_kept_and_runs(short_model, tmp_path):
    arguments = ("kernels", short_model, "-s", "int8-weight-only", "--kernel", "measured", "--threads", "1", "--json")
    first = json.loads(run_llmq(*arguments).stdout)
    assert all(choice["why"].startswith("measured for 1 and 512 rows: ") for choice in first)
    kept = tmp_path / "cache" / "llmq" / "kernel-choices.json"
    written = kept.read_bytes()
    assert json.loads(run_llmq(*arguments).stdout) == first
    assert kept.read_bytes() == written
    bench = ("--new-tokens", "1", "--repeats", "1", "--prompt-lengths", "8", "--scheme", "int8-weight-only", "--threads", "1")
    records = records_of(run_llmq("bench", "tokens-per-second", short_model, "--kernel", "measured", *bench, "--json"))
    named = {kernel for record in records for kernel in record["kernels"]}
    assert all(any(kernel in choice["kernels"] for choice in first) for kernel in named)


def test_a_damaged_file_is_a_note(short_model, tmp_path):
    kept = tmp_path / "cache" / "llmq" / "kernel-choices.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{")
    result = run_llmq("kernels", short_model, "-s", "int8-weight-only", "--kernel", "measured", "--threads", "1")
    assert f"{kept} is damaged or of another version" in result.stderr
    assert json.loads(kept.read_text())["version"] == 1


def test_options_that_ask_for_a_model(short_model):
    assert "name the model" in run_llmq("kernels", "--kernel", "measured", code=2).stderr
    assert "unknown kernel 'mesured'" in run_llmq("kernels", short_model, "--kernel", "mesured", code=5).stderr
