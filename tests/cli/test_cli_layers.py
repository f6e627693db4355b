"""`llmq eval layers`: a damaged linear is found, byte counts are exact, what is recommended holds, and what cannot be is said."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runs import records_of, run_llmq
from safetensors.torch import load_file, save_file

from llmq.api.candidates import Candidate, settle_candidates
from llmq.api.explaining import LayersRequest, explain_layers
from llmq.api.loading import Setup, open_model
from llmq.api.original_pair import open_pair
from llmq.api.recipes import Recipe
from llmq.errors import UsageError
from llmq.evaluation.originals import numbers, weight_of
from llmq.results.layers import block_table, layers_section, linear_table, order_of, pick_table, verification_table
from llmq.results.markdown import to_markdown
from llmq.results.record import ResultRecord
from llmq.schemes.overrides import Override
from llmq.schemes.registry import resolve

DAMAGED = "model.layers.1.mlp.down_proj"
ARGUMENTS = ("--windows", 4, "--window", 64, "--threads", 1)
REQUEST = {"windows": 4, "length": 64}
SETUP = Setup(dtype="fp32", threads=1)


@pytest.fixture(scope="module")
def artefact(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layers") / "int4"
    run_llmq("quantize", short_model, "-s", "int4", "-S", "group_size=128", "-o", out)
    return out


@pytest.fixture(scope="module")
def damaged(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact with the scales of one linear one and a half times too large."""
    out = tmp_path_factory.mktemp("damaged") / "int4"
    shutil.copytree(artefact, out)
    file = out / "model.safetensors"
    tensors = load_file(file)
    scale = next(name for name in tensors if name.startswith(DAMAGED) and "scale" in name)
    tensors[scale] = tensors[scale] * 1.5
    save_file(tensors, file)
    return out


@pytest.fixture(scope="module")
def found(damaged: Path, short_model: Path, evaluation_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command says of the damaged artefact."""
    file = tmp_path_factory.mktemp("record") / "layers.jsonl"
    (record,) = records_of(
        run_llmq(
            *("eval", "layers", damaged, "--reference", short_model, "--text", evaluation_text, *ARGUMENTS),
            *("--alone", "--record", file, "--json"),
        )
    )
    assert json.loads(file.read_text()) == record
    return record


@pytest.mark.slow
def test_a_damaged_linear_is_found_and_its_override_is_named(found: dict[str, Any], damaged: Path, short_model: Path) -> None:
    layers = found["details"]["layers"]
    assert found["kind"] == "layers"
    assert len(layers) == 21
    worst = max(layers, key=lambda name: layers[name]["cost_kl"]["value"])
    assert worst == DAMAGED
    assert min(layers, key=lambda name: layers[name]["sqnr"]["value"]) == DAMAGED
    assert max(layers, key=lambda name: layers[name]["weight_error"]["value"]) == DAMAGED
    assert max(layers, key=lambda name: layers[name]["alone_kl"]["value"]) == DAMAGED
    now, was = (open_model(str(path), None, Setup(threads=1)).model for path in (damaged, short_model))
    weight, error = numbers(weight_of(was, DAMAGED)), numbers(weight_of(now, DAMAGED)) - numbers(weight_of(was, DAMAGED))
    assert layers[DAMAGED]["sqnr"]["value"] == pytest.approx(20 * math.log10(weight.norm() / error.norm()), abs=1e-4)
    # scales half as large again move the outputs by about half of themselves
    assert layers[DAMAGED]["weight_error"]["value"] == pytest.approx(0.25, abs=0.05)
    first = next(note for note in found["notes"] if note.startswith("pick 1: "))
    assert first == f"pick 1: --override '{DAMAGED}=int4:group_size=64'"
    assert layers[DAMAGED]["pick"]["value"] == 1
    # nearly all of the error goes, and it does on other windows too
    metrics = found["metrics"]
    assert layers[DAMAGED]["pick_error_left"]["value"] < 0.05
    for name in ("measured_kl", "fresh_kl"):
        assert metrics[name]["value"] == pytest.approx(metrics["predicted_kl"]["value"], rel=0.2)
        assert metrics[name]["value"] > 3 * metrics[name]["stderr"] > 0


@pytest.mark.slow
def test_what_is_recommended_can_be_pasted_and_takes_the_bytes_that_are_named(
    found: dict[str, Any], damaged: Path, short_model: Path
) -> None:
    picks = {note.partition(": ")[0]: note.partition(": ")[2] for note in found["notes"] if note.startswith("pick ")}
    layers = found["details"]["layers"]
    chosen = [(name, each) for name, each in layers.items() if "pick" in each]
    assert len(chosen) == len(picks) == 5
    options = {"group_size": "128"}
    size = open_model(str(damaged), None, Setup(threads=1)).size.bytes
    assert found["subject"]["size_bytes"] == size
    overrides = []
    for name, each in chosen:
        text = picks[f"pick {int(each['pick']['value'])}"]
        assert text.startswith(f"--override '{name}=")
        overrides.append(Override.parse(text.removeprefix("--override '").removesuffix("'")))
        changed = open_model(str(short_model), Recipe("int4", options, overrides=(overrides[-1],)), Setup(threads=1))
        assert changed.size.bytes - size == each["pick_bytes"]["value"] > 0
        assert each["pick_size_share"]["value"] == pytest.approx(each["pick_bytes"]["value"] / size)
    together = open_model(str(short_model), Recipe("int4", options, overrides=tuple(overrides)), Setup(threads=1))
    assert together.size.bytes - size == found["metrics"]["picks_bytes"]["value"]


@pytest.mark.slow
def test_tables_say_the_same(found: dict[str, Any]) -> None:
    record = ResultRecord.model_validate(found)
    layers = record.details.layers
    blocks = block_table(record)
    assert blocks.rows[0][0] == "1"
    assert [row[0] for row in block_table(record, "layer").rows] == ["0", "1", "2", "all"]
    assert float(blocks.rows[-1][-1]) == pytest.approx(1e3 * sum(each["cost_kl"].value for each in layers.values()), abs=0.01)
    assert [column.heading for column in blocks.columns] == ["block", "q", "k", "v", "o", "gate", "up", "down", "all"]
    worst = linear_table(record)
    assert worst.rows[0][0] == DAMAGED
    assert len(worst.rows) == 20
    assert worst.notes == ("1 more that cost less",)
    assert [row[0] for row in linear_table(record, "layer").rows] == list(layers)
    picks, proof = pick_table(record), verification_table(record)
    assert picks is not None
    assert picks.rows[0][0] == f"--override '{DAMAGED}=int4:group_size=64'"
    assert picks.rows[0][1].startswith("-")
    assert proof is not None
    assert len(proof.rows) == 3
    section = layers_section(record)
    for content in (blocks, worst, picks, proof):
        assert to_markdown(content) in section
    with pytest.raises(UsageError, match="of kind decode says nothing"):
        block_table(record.model_copy(update={"kind": "decode"}))
    with pytest.raises(UsageError, match="worst or layer, got 'size'"):
        order_of("size")


@pytest.mark.slow
def test_the_terminal_names_it_first(damaged: Path, short_model: Path, evaluation_text: Path) -> None:
    shown = run_llmq(
        *("eval", "layers", damaged, "--reference", short_model, "--text", evaluation_text, *ARGUMENTS, "--top", 1),
        *("--candidate", "int8-weight-only"),
    ).output
    lines = [line.strip() for line in shown.splitlines()]
    at = next(index for index, line in enumerate(lines) if line.startswith("Overrides that buy most"))
    assert lines[at + 2].startswith(f"--override '{DAMAGED}=int8-weight-only'")
    assert any(line.startswith("measured on further windows") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8-dynamic", ()), ("int8-smoothquant", ("-S", "alpha_step=1", "-S", "compensate=false"))],
)
def test_schemes_that_round_inputs_or_fold_scales(
    scheme: str, options: tuple[str, ...], short_model: Path, evaluation_text: Path, calibration_text: Path
) -> None:
    source = ("--calibration", calibration_text, "--calibration-windows", 2, "--calibration-length", 64)
    arguments = (
        "eval",
        "layers",
        short_model,
        "-s",
        scheme,
        *options,
        "--text",
        evaluation_text,
        *source,
        *ARGUMENTS,
        "--dtype",
        "fp32",
    )
    (record,) = records_of(run_llmq(*arguments, "--json"))
    layers = record["details"]["layers"]
    assert len(layers) == 21
    # what is put back has to fit what was folded, or the loss would explode
    whole = record["metrics"]["kl_mean"]["value"]
    costs = [each["cost_kl"]["value"] for each in layers.values()]
    assert min(costs) > -0.2 * whole
    assert 0.5 * whole < sum(costs) < 1.6 * whole
    assert ("input_error" in layers[DAMAGED]) == scheme.startswith("int8")
    assert any("folds scales" in note for note in record["notes"]) == (scheme != "int8-dynamic")
    if scheme == "int8-smoothquant":
        run_llmq(*arguments, "--alone", code=2)


@pytest.mark.slow
def test_a_rotated_model_is_compared_with_the_original_rotated_alike(
    short_model: Path, evaluation_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rotated"
    run_llmq("quantize", short_model, "-s", "int4", "--rotate", "both", "--seed", 5, "-o", out)
    (record,) = records_of(
        run_llmq(
            *("eval", "layers", out, "--reference", short_model, "--text", evaluation_text, *ARGUMENTS, "--dtype", "fp32"),
            *("--top", 1, "--json"),
        )
    )
    costs = [each["cost_kl"]["value"] for each in record["details"]["layers"].values()]
    whole = record["metrics"]["kl_mean"]["value"]
    assert min(costs) > -0.2 * whole
    assert 0.5 * whole < sum(costs) < 1.6 * whole
    assert all(each["sqnr"]["value"] > 15 for each in record["details"]["layers"].values())
    assert any("rotated alike" in note for note in record["notes"])
    assert record["metrics"]["measured_kl"]["value"] > 0


@pytest.mark.slow
def test_an_original_weight_leaves_no_error(short_model: Path, evaluation_text: Path) -> None:
    request = LayersRequest(4, 2, str(evaluation_text), 64, ("original",))
    found = explain_layers(str(short_model), request, Recipe("int4", {"group_size": "64"}), SETUP)
    assert found.picks
    for pick in found.picks:
        assert pick.argument == f"--skip '{pick.fqn}'"
        assert pick.left == 0
        n, k = next(each.shape for each in found.linears if each.fqn == pick.fqn)
        # fp32 for 4 bits with a scale and a zero point of 16 bits for each 64
        assert pick.extra_bytes == 4 * n * k - n * k // 2 - 4 * n * k // 64
    assert found.verification is not None
    one = max(found.picks, key=lambda pick: pick.predicted.mean_kl.value)
    assert found.verification.measured.mean_kl.value > 0.5 * one.predicted.mean_kl.value > 0


def test_a_short_text_has_no_further_windows(short_model: Path, tmp_path: Path, evaluation_text: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(evaluation_text.read_text()[:1200])
    recipe = Recipe("int4", {"group_size": "128"}, skip=("model.layers.[02].*",))
    found = explain_layers(str(short_model), LayersRequest(64, 1, str(text), 64, ("original",)), recipe, SETUP)
    assert found.verification is not None
    assert found.verification.fresh is None
    assert "no further windows" in " ".join(found.record.notes)
    assert len(found.linears) == 7


def test_candidates_by_default_and_by_name() -> None:
    names = [str(each) for each in settle_candidates((), resolve("int4-gptq", {"group_size": 128})).each]
    assert names[-2:] == ["int8-weight-only", "original"]
    assert {"int4-gptq:group_size=32", "int4-gptq:group_size=64"} <= set(names)
    assert [str(each) for each in settle_candidates((), resolve("int8-dynamic")).each] == ["int8-weight-only", "original"]
    assert "int8-dynamic-int4:group_size=64" in map(str, settle_candidates((), resolve("int8-dynamic-int4")).each)
    best = settle_candidates((), resolve("int4-best"))
    assert "int4-gptq:group_size=32" in map(str, best.each)
    assert "Fisher" in best.note
    named = settle_candidates(("original", "int8-weight-only"), resolve("int4"))
    assert named.each == (Candidate(None), Candidate(resolve("int8-weight-only")))
    for wrong, message in (
        (("int4-best",), "needs Fisher factors"),
        (("int8-weight-only", "int8-weight-only"), "named twice"),
        (("int5",), "unknown scheme"),
        (("int4:group=3",), "no option"),
        (("bf16",), "baseline"),
        (("int8-smoothquant:activations=static,compensate=false",), "calibrated scale of its inputs"),
    ):
        with pytest.raises(UsageError, match=message):
            settle_candidates(wrong, resolve("int4"))


def changed_config(model: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(folder / "model.safetensors")
    size = int(changes["vocab_size"])  # type: ignore[call-overload]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(size, tensors[name].shape[1], dtype=tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_what_cannot_be_is_said_in_one_sentence(
    artefact: Path, short_model: Path, wt2_8m: Path, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = changed_config(short_model, tmp_path / "wider", vocab_size=4100)
    gptq = tmp_path / "gptq"
    source = ("--calibration", calibration_text, "--calibration-windows", 2, "--calibration-length", 64)
    run_llmq("quantize", short_model, "-s", "int4-gptq", *source, "-o", gptq)
    excerpt = tmp_path / "excerpt.txt"
    excerpt.write_text(calibration_text.read_text()[:6000])
    whole = ("--calibration", excerpt, "--calibration", calibration_text, "--calibration-windows", 4, "--calibration-length", 64)
    for arguments, code, message in (
        ((short_model,), 2, "is not quantized, so there is no loss to explain; name a scheme with --scheme"),
        ((short_model, "-s", "bf16"), 2, "scheme bf16 quantizes no linear"),
        ((artefact,), 2, "name the original checkpoint that it was made from with --reference"),
        ((artefact, "--reference", artefact), 2, "is quantized itself (scheme int4)"),
        ((artefact, "--reference", wt2_8m), 2, "has num_layers 3, and the reference"),
        ((artefact, "--reference", wider), 2, "has vocab_size 4096, and the reference"),
        ((artefact, "--reference", short_model, "-s", "int4"), 2, "is quantized already"),
        ((artefact, "--reference", short_model, "--sort", "size"), 2, "--sort is worst or layer"),
        ((artefact, "--reference", short_model, "--candidate", "int9"), 2, "unknown scheme"),
        ((artefact, "--reference", short_model, "--window", 4096), 2, "reads at most"),
        ((artefact, "--reference", short_model, "--text", tmp_path / "none.txt"), 3, "cannot read text"),
        ((short_model, "-s", "int4", "-S", "size=3"), 2, "option"),
        ((short_model, "-s", "int4-gptq", *source, "--text", calibration_text), 2, "is the text that was calibrated on"),
        ((gptq, "--reference", short_model, "--text", calibration_text), 2, "is the text that was calibrated on"),
        ((short_model, "-s", "int4-gptq", *whole, "--text", excerpt), 2, "of the passages of the windows of excerpt.txt"),
    ):
        said = " ".join(run_llmq("eval", "layers", *ARGUMENTS, *arguments, code=code).output.split())
        assert message in said
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000_000, total=10_000_000))
    with pytest.raises(UsageError, match=r"take 0\.0 GB together, and 0\.0 GB of memory are free"):
        open_pair(str(artefact), None, SETUP, str(short_model))


def test_another_makers_checkpoint(stories260k: Path, evaluation_text: Path) -> None:
    # 172 inputs of down_proj cannot be cut into groups of 32
    (record,) = records_of(
        run_llmq(
            *("eval", "layers", stories260k, "-s", "int4", "-S", "group_size=32", "--skip-unfit", "--text", evaluation_text),
            *("--windows", 2, "--window", 128, "--threads", 1, "--top", 0, "--json"),
        )
    )
    layers = record["details"]["layers"]
    assert len(layers) == 5 * 6
    assert not any("down_proj" in name for name in layers)
    assert "predicted_kl" not in record["metrics"]
