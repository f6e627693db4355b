"""Mixed precision on the command line: budgets are kept, choices are the best ones, and what cannot be is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cli_runs import run_llmq

import llmq
from llmq.api.calibrating import CalibrationSource
from llmq.api.mixing import Target, parse_size, solve_mixture
from llmq.api.sensing import SensitivityRequest, default_candidates, measure_sensitivity, with_algorithm
from llmq.calibration.sensitivity import LinearSensitivity
from llmq.calibration.sensitivity_file import SensitivityTable
from llmq.checkpoint import open_checkpoint
from llmq.errors import InputError, UsageError
from llmq.schemes.overrides import Override
from llmq.schemes.registry import resolve

CANDIDATES = (*(resolve("int4", {"group_size": size}) for size in (32, 64, 128)), resolve("int8-weight-only"))
SHAPES = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)}
WIDE = {"gate": (768, 256), "up": (768, 256), "down": (256, 768)}


@pytest.fixture(scope="module")
def table(wt2_8m: Path) -> SensitivityTable:
    """Sensitivities as they are, made up: a few linears matter a hundred times more, and a bit is worth a factor of four."""
    generator = torch.Generator().manual_seed(7)
    linears = []
    for layer in range(8):
        for kind, shape in {f"self_attn.{name}": shape for name, shape in SHAPES.items()}.items() | {
            f"mlp.{name}": shape for name, shape in WIDE.items()
        }.items():
            scale = 10 ** float(torch.rand((), generator=generator) * 3 - 6)
            bits = [candidate.format.weight.bits_per_weight(shape[1]) for candidate in CANDIDATES]
            linears.append(
                LinearSensitivity(f"model.layers.{layer}.{kind}_proj", shape, tuple(scale * 4 ** (4.25 - b) for b in bits))
            )
    order = {name: index for index, name in enumerate(_linears(wt2_8m))}
    return SensitivityTable(
        model="wt2-8m",
        model_sha256=open_checkpoint(str(wt2_8m)).sha256,
        method="measured",
        calibration={"source_sha256": "0" * 64},
        held_out=8,
        threads=1,
        candidates=CANDIDATES,
        linears=tuple(sorted(linears, key=lambda each: order[each.fqn])),
    )


def _linears(path: Path) -> list[str]:
    model = llmq.load(str(path)).model
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]


@pytest.fixture
def table_file(table: SensitivityTable, tmp_path: Path) -> Path:
    table.save(tmp_path / "sensitivity.json")
    return tmp_path / "sensitivity.json"


@pytest.mark.slow
def test_a_budget_of_bits_is_kept_and_recorded(wt2_8m: Path, table: SensitivityTable, table_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("quantize", wt2_8m, "-s", "int4", "--target-bpw", 4.55, "--sensitivity", table_file, "-o", out)
    shown = " ".join(run_llmq(*arguments).output.split())
    assert "no other choice is predicted to lose less" in shown
    manifest = json.loads((out / "llmq.json").read_text())
    bits = json.loads(run_llmq("inspect", out, "--json").stdout)["matrix_bits_per_weight"]
    assert 4.55 * 0.995 < bits <= 4.55
    assert manifest["allocation"]["bits_per_weight"] == pytest.approx(bits, abs=1e-12)
    assert manifest["allocation"]["sensitivity_sha256"] == table.sha256
    assert manifest["allocation"]["target_bits_per_weight"] == 4.55
    # what was chosen is what is there, and its predictions sum to the one that is recorded
    chosen = {each["pattern"]: resolve(each["scheme"], each["options"]) for each in manifest["overrides"]}
    predicted = 0.0
    for each in table.linears:
        scheme = chosen.get(each.fqn, resolve("int4"))
        predicted += each.kl[CANDIDATES.index(scheme)] or math.inf
        stored = manifest["formats"][each.fqn]["weight"]
        grid = scheme.format.weight.to_json()
        assert (stored["bits"], stored["group_size"]) == (grid["bits"], grid["group_size"])
    assert manifest["allocation"]["predicted_kl"] == pytest.approx(predicted, rel=1e-12)
    # every uniform choice under the budget is predicted to lose more
    for index, candidate in enumerate(CANDIDATES):
        if candidate.format.weight.bits_per_weight(256) <= 4.55:
            assert predicted < sum(each.kl[index] or 0 for each in table.linears)


@pytest.mark.slow
def test_a_budget_of_bytes_is_that_of_the_file(wt2_8m: Path, table_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("quantize", wt2_8m, "-s", "int4", "--target-size", "7.8MB", "--sensitivity", table_file, "-o", out)
    run_llmq(*arguments)
    size = (out / "model.safetensors").stat().st_size
    assert 0.995 * 7.8e6 < size <= 7.8e6
    predicted = json.loads((out / "llmq.json").read_text())["allocation"]["size_bytes"]
    assert size <= predicted < 1.002 * size  # the header is estimated from above
    planned = json.loads(run_llmq(*arguments[:-2], "--dry-run", "--json").stdout)
    assert planned["total_bytes"] < size


def test_linears_with_an_override_keep_it_and_count(wt2_8m: Path, table: SensitivityTable) -> None:
    mine = (Override("*.down_proj", "int8-weight-only"),)
    recipe = llmq.Recipe("int4", overrides=mine)
    found = solve_mixture(str(wt2_8m), recipe, llmq.Setup(), table, Target(bits_per_weight=5.5))
    assert not any(row.fqn.endswith("down_proj") for row in found.rows)
    assert found.overrides[0] == mine[0]
    assert found.bits_per_weight <= 5.5
    elements = {each.fqn: math.prod(each.shape) for each in table.linears}
    fixed = sum(count * CANDIDATES[3].format.weight.bits_per_weight(768) for fqn, count in elements.items() if "down" in fqn)
    bits = (fixed + 8 * sum(row.nbytes for row in found.rows)) / sum(elements.values())
    assert found.bits_per_weight == pytest.approx(bits, rel=1e-9)
    skipping = llmq.Recipe("int4", skip=("*.down_proj",))
    rest = solve_mixture(str(wt2_8m), skipping, llmq.Setup(), table, Target(bits_per_weight=5))
    assert len(rest.rows) == 48
    assert rest.bits_per_weight <= 5


def test_budgets_that_cannot_be(wt2_8m: Path, stories260k: Path, table_file: Path, tmp_path: Path) -> None:
    quantize = ("quantize", wt2_8m, "-s", "int4", "-o", tmp_path / "out")
    small = run_llmq(*quantize, "--target-bpw", 4, "--sensitivity", table_file, code=2).output
    assert "the smallest candidates take 4.250 bits per weight" in " ".join(small.split())
    assert "too small" in run_llmq(*quantize, "--target-size", "5MB", "--sensitivity", table_file, code=2).output
    both = ("--target-bpw", 4.5, "--target-size", "9MB", "--sensitivity", table_file)
    assert "name one of them" in run_llmq(*quantize, *both, code=2).output
    assert "such as 4GB" in run_llmq(*quantize, "--target-size", "4 parsecs", code=2).output
    assert "for a budget" in run_llmq(*quantize, "--sensitivity", table_file, code=2).output
    assert "positive number" in run_llmq(*quantize, "--target-bpw", -1, code=2).output
    other = run_llmq(
        *("quantize", stories260k, "-s", "int4", "-S", "group_size=32", "--skip-unfit", "-o", tmp_path / "out"),
        *("--target-bpw", 5, "--sensitivity", table_file),
        code=3,
    )
    assert "another model" in other.output
    damaged = tmp_path / "damaged.json"
    damaged.write_text(table_file.read_text().replace('"held_out"', '"held"'))
    assert "not a table" in run_llmq(*quantize, "--target-bpw", 4.5, "--sensitivity", damaged, code=3).output
    with_candidates = ("--target-bpw", 4.5, "--sensitivity", table_file, "--candidate", "int4")
    assert "candidates of its own" in run_llmq(*quantize, *with_candidates, code=2).output
    assert not (tmp_path / "out").exists()


def test_a_table_is_written_and_read(table: SensitivityTable, table_file: Path, tmp_path: Path) -> None:
    read = SensitivityTable.load(table_file, model_sha256=table.model_sha256)
    assert read == table
    assert read.sha256 == table.sha256
    read.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == table_file.read_bytes()
    with pytest.raises(InputError, match="another model"):
        SensitivityTable.load(table_file, model_sha256="f" * 64)


@pytest.mark.slow
def test_sensitivities_are_measured_and_used_again(stories260k: Path, calibration_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "sensitivity.json"
    base = ("-s", "int4", "-S", "group_size=32", "--skip-unfit", "--calibration", calibration_text)
    windows = ("--calibration-windows", 4, "--calibration-length", 32)
    candidates = ("--candidate", "int4:group_size=32", "--candidate", "int8-weight-only")
    command = ("sensitivity", stories260k, *base, *windows, *candidates, "--held-out", 2)
    shown = run_llmq(*command, "-o", out).output
    assert "int8-weight-only" in shown
    assert "--force" in run_llmq(*command, "-o", out, code=6).output
    run_llmq(*command, "-o", tmp_path / "again.json")
    assert out.read_bytes() == (tmp_path / "again.json").read_bytes()
    data = json.loads(out.read_text())
    assert (data["method"], data["held_out"], data["calibration"]["windows"]) == ("measured", 2, 4)
    assert len(data["linears"]) == 30  # all that have at least 32 inputs in groups of 32
    assert all(each["kl"][1] < each["kl"][0] for each in data["linears"].values())  # 8 bits lose less than 4
    mixed = tmp_path / "mixed"
    run_llmq("quantize", stories260k, *base, "--target-bpw", 6, "--sensitivity", out, "-o", mixed)
    assert json.loads(run_llmq("inspect", mixed, "--json").stdout)["matrix_bits_per_weight"] <= 6
    few = run_llmq("sensitivity", stories260k, *base, *windows, "--held-out", 4, "-o", tmp_path / "x", code=2)
    assert "too few to keep 4 of them back" in few.output


@pytest.mark.slow
def test_fisher_factors_and_runs_agree_on_what_matters(wt2_8m: Path, calibration_text: Path) -> None:
    """The two methods share nothing but the model and the quantized weights."""
    keep = ("model.layers.[1-6].*",)
    source = CalibrationSource(str(calibration_text), windows=20, length=128)
    recipe = llmq.Recipe("int4", skip=keep, calibration=source)
    found = {}
    for method in ("measured", "fisher"):
        request = SensitivityRequest(("int4", "int4:group_size=32"), method, held_out=4)
        found[method] = measure_sensitivity(str(wt2_8m), recipe, llmq.Setup(), request)
    measured, fisher = (
        torch.tensor([[kl for kl in each.kl if kl is not None] for each in found[method].linears]) for method in found
    )
    assert measured.shape == (14, 2)
    ratio = (fisher / measured).log()
    assert ratio.abs().max() < math.log(3)  # over values that lie a factor of a thousand apart
    assert (measured.max() / measured.min()) > 1000
    assert torch.corrcoef(torch.stack([measured.flatten().log(), fisher.flatten().log()]))[0, 1] > 0.97


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("4gb", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("900MB", 900 * 10**6), ("123", 123), ("2k", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4iB", "4XB", "4GBB", "1e9"])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="such as 4GB"):
        parse_size(text)


def test_choices_that_were_measured_with_one_algorithm_are_made_with_another(wt2_8m: Path, table: SensitivityTable) -> None:
    base = resolve("int4-gptq", {"damping": 0.02, "group_size": 64})
    found = with_algorithm(CANDIDATES, base)
    assert [each.name for each in found] == ["int4-gptq"] * 3 + ["int8-weight-only"]
    assert [each.options_json()["group_size"] for each in found[:3]] == [32, 64, 128]
    assert all(each.options_json()["damping"] == 0.02 for each in found[:3])
    assert [each.format for each in found] == [each.format for each in CANDIDATES]
    assert with_algorithm(CANDIDATES, resolve("int4", {"group_size": 64})) == CANDIDATES  # the algorithm is the same
    assert with_algorithm(CANDIDATES, resolve("int8-dynamic")) == CANDIDATES  # which has none
    recipe = llmq.Recipe("int4-gptq", {"damping": "0.02"})
    mixed = solve_mixture(str(wt2_8m), recipe, llmq.Setup(), table, Target(bits_per_weight=4.6))
    assert {each.scheme for each in mixed.overrides} <= {"int4-gptq", "int8-weight-only"}
    assert mixed.other_algorithm
    assert "windows with int4, linear by linear" in mixed.sentence()


def test_candidates() -> None:
    found = default_candidates(resolve("int4", {"symmetric": "true"}))
    assert [each.options_json().get("group_size") for each in found if each.name == "int4"] == [32, 64, 128]
    assert all(each.options_json()["symmetric"] for each in found if each.name == "int4")
    assert found[-1].name == "int8-weight-only"
    for base in ("int8-weight-only", "int8-dynamic", "bf16"):
        with pytest.raises(UsageError, match="name candidates with --candidate"):
            default_candidates(resolve(base))
    named = SensitivityRequest(("int4:group_size=64", "int8-weight-only")).resolve(resolve("int4"))
    assert [each.name for each in named] == ["int4", "int8-weight-only"]
    with pytest.raises(UsageError, match="named twice"):
        SensitivityRequest(("int4", "int4:group_size=128")).resolve(resolve("int4"))
    with pytest.raises(UsageError, match="unknown method 'fishr'"):
        SensitivityRequest(method="fishr").settle_method(needs_factors=False)
    assert SensitivityRequest().settle_method(needs_factors=True) == "fisher"
