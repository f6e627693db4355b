"""The main job as a user does it: quantize, inspect, generate, evaluate, bench, compare; and what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import records_of, run_llmq
from safetensors.torch import load_file, save_file
from shortening import LAYERS

import llmq
from llmq.api.calibrating import CalibrationSource

SMALL = ("--window", 64, "--limit", 4)


def test_quantize_inspect_generate(int4_artefact: Path) -> None:
    inspected = run_llmq("inspect", int4_artefact, "--verify", "--layers").output
    assert "int4" in inspected
    assert "5.000" in inspected  # bits per weight: 4 + (16 + 16) / 32
    facts = json.loads(run_llmq("inspect", int4_artefact, "--json").stdout)
    assert facts["matrix_bits_per_weight"] == 5.0
    text = run_llmq("generate", int4_artefact, "The ship was built in", "-n", 8).stdout
    assert text.startswith("The ship was built in ")
    assert text == run_llmq("generate", int4_artefact, "The ship was built in", "-n", 8).stdout


@pytest.mark.slow
def test_a_reloaded_artefact_has_bit_identical_logits(wt2_8m: Path, int4_artefact: Path) -> None:
    tokens = torch.arange(48).reshape(2, 24) * 7 + 3
    kept = llmq.load(str(wt2_8m), llmq.Recipe("int4", {"group_size": 32}))
    read = llmq.load(str(int4_artefact), None)
    with torch.no_grad():
        assert torch.equal(kept.model(tokens), read.model(tokens))
    assert read.scheme == "int4"
    assert read.options["group_size"] == 32


@pytest.mark.slow
def test_the_same_seed_and_threads_write_the_same_bytes(short_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    small = ("--calibration-windows", 8, "--calibration-length", 64)
    arguments = ("quantize", short_model, "-s", "int4-gptq", "--calibration", calibration_text, *small)
    for name in ("a", "b"):
        run_llmq(*arguments, "--threads", 2, "-o", tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "llmq.json" in files
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    manifest = json.loads((tmp_path / "a" / "llmq.json").read_text())
    assert manifest["calibration"]["windows"] == 8
    assert len(manifest["layers"]) == 7 * LAYERS
    assert all(layer["loss"] <= layer["rtn_loss"] for layer in manifest["layers"])
    assert manifest["skipped"] == {"lm_head": "the output head is kept unless --lm-head"}


def test_an_existing_output_is_not_touched_without_force(wt2_8m: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    failed = run_llmq("quantize", wt2_8m, "-s", "int8-weight-only", "-o", out, code=6)
    assert "--force" in failed.output
    assert [path.name for path in out.iterdir()] == ["precious"]
    run_llmq("quantize", wt2_8m, "-s", "int8-weight-only", "-o", out, "--force")
    assert not (out / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no temporary is left


def test_dry_run_reads_no_weight_and_predicts_the_size(wt2_8m: Path, int4_artefact: Path, tmp_path: Path) -> None:
    hollow = tmp_path / "hollow"
    shutil.copytree(wt2_8m, hollow)
    weights = hollow / "model.safetensors"
    size = weights.stat().st_size
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as file:  # the header stays, every weight becomes NaN: reading one would be an error
        file.seek(header)
        file.write(b"\xff" * (size - header))
    planned = json.loads(run_llmq("quantize", hollow, "-s", "int4", "-S", "group_size=32", "--dry-run", "--json").stdout)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(int4_artefact / "model.safetensors").values())
    assert planned["total_bytes"] == stored
    assert planned["bits_per_weight"] == 5.0
    assert "5.000 bits per weight" in run_llmq("quantize", hollow, "-s", "int4", "-S", "group_size=32", "--dry-run").output


def test_eval_perplexity_with_reference_and_stored_losses(
    wt2_8m: Path, int4_artefact: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    losses = tmp_path / "bf16.safetensors"
    records = tmp_path / "records.jsonl"
    common = ("--text", evaluation_text, *SMALL)
    run_llmq("eval", "perplexity", wt2_8m, *common, "--losses", losses, "--record", records)
    again = run_llmq("eval", "perplexity", wt2_8m, *common, "--versus", losses)
    assert "every loss is bit for bit the same" in again.output
    run_llmq("eval", "perplexity", wt2_8m, *common, "--losses", losses, code=6)
    found = records_of(run_llmq("eval", "perplexity", int4_artefact, *common, "--reference", wt2_8m, "--json"))
    assert [record["kind"] for record in found] == ["perplexity", "divergence"]
    perplexity, divergence = found
    params = perplexity["protocol"]["params"]
    assert (params["length"], params["n_windows"], params["n_scored_tokens"]) == (64, 4, 4 * 63)
    assert 0 < divergence["metrics"]["kl_mean"]["value"] < 0.2
    assert divergence["metrics"]["kl_mean"]["stderr"] > 0
    assert 0.7 < divergence["metrics"]["top1_agreement"]["value"] < 1
    assert sum(perplexity["kernels"].values()) >= 56
    other_window = run_llmq(
        "eval", "perplexity", wt2_8m, "--text", evaluation_text, "--window", 32, "--limit", 4, "--versus", losses, code=2
    )
    assert "length" in other_window.output
    assert len(records.read_text().splitlines()) == 1


@pytest.mark.parametrize("protocol", ["windows", "llamacpp", "lmeval-word"])
def test_every_protocol_runs_and_names_itself(wt2_8m: Path, evaluation_text: Path, protocol: str) -> None:
    arguments = ("eval", "perplexity", wt2_8m, "--text", evaluation_text, "--protocol", protocol, "--limit", 1)
    record = records_of(run_llmq(*arguments, "--json"))[0]
    assert record["protocol"]["name"] == protocol
    assert record["metrics"]["perplexity"]["value"] > 1
    assert ("word_perplexity" in record["metrics"]) == (protocol == "lmeval-word")


@pytest.mark.slow
def test_compare_prints_the_table_and_orders_the_schemes(
    short_model: Path, calibration_text: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    result = run_llmq(
        *("compare", short_model, "--text", evaluation_text, "--limit", 12, "--calibration", calibration_text),
        *("--calibration-windows", 16, "--repeats", 2, "--new-tokens", 8, "--record", records),
    )
    for heading in ("scheme", "perplexity", "KL (nats/token)", "decode tok/s", "GB/s", "bits/weight", "size"):
        assert heading in result.stdout
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    kl = {line["subject"]["scheme"]: line["metrics"]["kl_mean"]["value"] for line in lines if line["kind"] == "divergence"}
    order = ["bf16", "int8-weight-only", "int8-dynamic", "int4-gptq", "int4"]
    assert [name for name in sorted(kl, key=lambda name: kl[name]) if name in order] == order
    assert kl["bf16"] == 0
    speeds = [line["metrics"]["tokens_per_s"]["value"] for line in lines if line["kind"] == "decode"]
    assert len(speeds) == 6
    assert min(speeds) > 0
    markdown = run_llmq("report", "table", records, "--markdown").stdout
    assert markdown.count("\n| ") >= 7


@pytest.mark.slow
def test_calibration_that_overlaps_the_evaluation_is_said(short_model: Path, evaluation_text: Path) -> None:
    recipe = llmq.Recipe("int4-gptq", calibration=CalibrationSource(str(evaluation_text), windows=4, length=128))
    found = llmq.evaluate(str(short_model), recipe, question=llmq.Question(str(evaluation_text), window=64, limit=2))
    assert any("calibrate on another text" in note for note in found.records[0].notes)


@pytest.mark.slow
def test_calibrate_writes_a_set_that_quantize_takes(short_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "windows.bin"  # the name says nothing; the content does
    arguments = ("calibrate", short_model, "--text", calibration_text, "--calibration-windows", 4, "--calibration-length", 64)
    run_llmq(*arguments, "-o", recorded)
    assert "--force" in run_llmq(*arguments, "-o", recorded, code=6).output
    planned = run_llmq("quantize", short_model, "-s", "int4-gptq", "--calibration", recorded, "-o", tmp_path / "out")
    assert "of RTN's" in planned.output
    manifest = json.loads((tmp_path / "out" / "llmq.json").read_text())
    assert (manifest["calibration"]["windows"], manifest["calibration"]["length"]) == (4, 64)


def test_a_shape_that_does_not_fit_is_named_and_can_be_skipped(stories260k: Path, tmp_path: Path) -> None:
    refused = run_llmq("quantize", stories260k, "-s", "int4", "-S", "group_size=32", "-o", tmp_path / "out", code=4)
    assert "down_proj" in refused.output
    assert "--skip-unfit" in refused.output
    assert not (tmp_path / "out").exists()
    done = run_llmq("quantize", stories260k, "-s", "int4", "-S", "group_size=32", "--skip-unfit", "-o", tmp_path / "out")
    assert "does not fit" in done.output
    run_llmq("quantize", stories260k, "-s", "int4", "-S", "group_size=32", "--skip", "*.nonsense", "-o", tmp_path / "x", code=2)
    assert run_llmq("generate", tmp_path / "out", "Once upon a time", "-n", 12).stdout.startswith("Once upon a time")


@pytest.mark.slow
def test_compare_on_a_llama2c_file(stories260k: Path, evaluation_text: Path, calibration_text: Path) -> None:
    result = run_llmq(
        *("compare", stories260k / "stories260K.bin", "--schemes", "bf16,int8-weight-only,int8-dynamic,int4,int4-gptq"),
        *("-S", "group_size=32", "--skip-unfit", "--text", evaluation_text, "--limit", 4, "--repeats", 1, "--new-tokens", 4),
        *("--calibration", calibration_text, "--calibration-windows", 8),
    )
    assert "stories260K.bin" in result.stdout
    assert "does not fit" in result.stdout


@pytest.mark.slow
def test_bench_tokens_per_second(int4_artefact: Path) -> None:
    arguments = ("--batch-sizes", "1,2", "--prompt-lengths", "16", "--contexts", "8,24", "--new-tokens", 2, "--repeats", 2)
    found = records_of(run_llmq("bench", "tokens-per-second", int4_artefact, *arguments, "--json"))
    assert [record["kind"] for record in found].count("prefill") == 2
    decode = [record for record in found if record["kind"] == "decode"]
    assert len(decode) == 4
    for record in decode:
        metrics = record["metrics"]
        tpot, rate = metrics["tpot_s"]["value"], metrics["tokens_per_s"]["value"]
        assert rate == pytest.approx(record["protocol"]["params"]["batch_size"] / tpot)
        assert metrics["bandwidth_gbps"]["value"] == pytest.approx(metrics["bytes_per_step"]["value"] / tpot / 1e9)
        assert metrics["bandwidth_share"]["value"] > 0
        assert metrics["peak_memory_bytes"]["value"] > 1e7
    too_long = run_llmq("bench", "tokens-per-second", int4_artefact, "--prompt-lengths", "300", code=2)
    assert "256" in too_long.output


@pytest.mark.slow
def test_eval_tasks_runs_a_local_task(wt2_8m: Path, tmp_path: Path) -> None:
    rows = [{"q": "The ship was", "c": ["built", "zqxj"], "a": 0}, {"q": "The king was", "c": ["xqzvk", "the"], "a": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    definition = {
        "task": "llmq_cli_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (tmp_path / "choice.yaml").write_text(json.dumps(definition))  # JSON is YAML
    arguments = ("eval", "tasks", wt2_8m, "--tasks", "llmq_cli_choice", "--include-path", tmp_path)
    record = records_of(run_llmq(*arguments, "--json"))[0]
    assert (record["kind"], record["protocol"]["params"]["n_documents"]) == ("tasks", 2)
    assert record["metrics"]["acc"]["value"] == 1.0  # words against letters in no order
    again = records_of(run_llmq(*arguments, "--kv-cache", "int8", "--json"))[0]
    assert again["subject"]["kv_cache"]["dtype"] == "int8"
    assert again["metrics"]["acc"]["value"] == 1.0


@pytest.mark.slow
def test_bench_kernels_and_bandwidth() -> None:
    found = records_of(run_llmq("bench", "kernels", "--shapes", "64x128", "--rows", "1,3", "--only", "bf16,int4", "--json"))
    assert {record["protocol"]["params"]["rows"] for record in found} == {1, 3}
    assert any("reference" in record["kernels"] for record in found)
    for record in found:
        integers = any(name.startswith("native-int") for name in record["kernels"])
        assert ("int8_peak_share" if integers else "float32_peak_share") in record["metrics"]
    walls = records_of(run_llmq("bench", "bandwidth", "--json"))[0]["metrics"]
    assert walls["bandwidth_gbps"]["value"] > 0.1


def test_a_kernel_that_cannot_run_here_is_exit_5(int4_artefact: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so tinygemm can run")
    refused = run_llmq("generate", int4_artefact, "x", "--kernel", "tinygemm", code=5)
    assert "tinygemm" in refused.output
    unknown = run_llmq("generate", int4_artefact, "x", "--kernel", "tinygem", code=5)
    assert "Did you mean 'tinygemm'?" in unknown.output
    if not torch.cuda.is_available():
        assert "CUDA" in run_llmq("generate", int4_artefact, "x", "--device", "cuda", code=2).output


def test_the_kernel_that_is_asked_for_runs(int4_artefact: Path, evaluation_text: Path) -> None:
    arguments = ("eval", "perplexity", int4_artefact, "--text", evaluation_text, *SMALL, "--kernel", "reference", "--json")
    assert records_of(run_llmq(*arguments))[0]["kernels"]["reference"] >= 56


def test_schemes_kernels_and_env() -> None:
    assert "group_size" in run_llmq("schemes", "int4").output
    names = [row["name"] for row in json.loads(run_llmq("schemes", "--json").stdout)]
    assert names[:3] == ["bf16", "fp16", "fp32"]
    table = json.loads(run_llmq("kernels", "--json").stdout)
    assert table[-1]["name"] == "reference"
    assert all(row["available"] or row["reason"] for row in table)
    assert "reference" in run_llmq("kernels").output
    environment = json.loads(run_llmq("env", "--json").stdout)
    assert environment["native"]["available"] or environment["native"]["reason"]
    assert environment["packages"]["torch"] in run_llmq("env").output


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("absent", "does not exist"),
        ("empty", "holds no files"),
        ("truncated", "model.safetensors"),
        ("nan", "model.layers.3.mlp.up_proj.weight"),
        ("tokenizer", "tokenizer"),
        ("config", "config.json"),
    ],
)
def test_bad_checkpoints_are_one_sentence_and_exit_3(
    wt2_8m: Path, stories260k: Path, evaluation_text: Path, tmp_path: Path, damage: str, said: str
) -> None:
    model = tmp_path / "model"
    if damage != "absent":
        shutil.copytree(wt2_8m, model)
    weights = model / "model.safetensors"
    if damage == "empty":
        shutil.rmtree(model)
        model.mkdir()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "nan":
        tensors = load_file(weights)
        tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = torch.nan
        save_file(tensors, weights)
    elif damage == "tokenizer":
        (model / "tokenizer.model").write_bytes(b"no tokenizer")
    elif damage == "config":
        (model / "config.json").write_text('{"model_type": "gpt2"}')
    result = run_llmq("eval", "perplexity", model, "--text", evaluation_text, *SMALL, code=3)
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_demo_runs_and_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMQ_WIKITEXT_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    result = run_llmq("demo", "--limit", 4, "--schemes", "bf16,int4")
    assert "bundled sample" in result.stdout
    assert "llmq quantize" in result.stdout or "quantize" in result.stdout.split("Next")[1]
    assert list(tmp_path.iterdir()) == []
