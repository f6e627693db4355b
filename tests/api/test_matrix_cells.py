"""The recipe of a matrix and what it means, and the joining of seeds, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from llmq.api.matrix_recipe import MatrixRecipe, cells_of, read_recipe
from llmq.api.matrix_table import matrix_rows, matrix_table
from llmq.errors import InputError, UsageError
from llmq.results.record import Environment, Kind, Metric, Protocol, ResultRecord, Subject
from llmq.results.tokens import TokenFigures

SHIPPED = sorted((Path(__file__).parent.parent.parent / "configs" / "recipes").glob("matrix-*.toml"))


def recipe(tmp_path: Path, text: str) -> MatrixRecipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return read_recipe(path)


def test_each_distinct_cell_once(tmp_path: Path) -> None:
    found = cells_of(recipe(tmp_path, """
        model = "m"
        schemes = ["bf16", "int8-weight-only", "int4", "int4-gptq", { name = "int3-gptq", options = { group_size = 64 } }]
        group_sizes = [32, 128]
        seeds = [0, 1, 2]
        calibration = [{ name = "a" }, { name = "b", sources = ["b.txt"], windows = 4 }]
    """))  # fmt: skip
    assert found.combinations == 5 * 2 * 2 * 3
    calibrated = [f"calibration={name} seed={seed}" for name in "ab" for seed in range(3)]
    assert [cell.label for cell in found.cells] == [
        "bf16",
        "int8-weight-only",
        "int4 group_size=32",
        "int4 group_size=128",
        *(f"int4-gptq group_size=32 {axes}" for axes in calibrated),
        *(f"int4-gptq group_size=128 {axes}" for axes in calibrated),
        *(f"int3-gptq group_size=64 {axes}" for axes in calibrated),
    ]
    assert len({cell.key for cell in found.cells}) == 22


def test_the_reference_is_always_a_cell_and_the_first(tmp_path: Path) -> None:
    found = cells_of(recipe(tmp_path, 'model = "m"\nschemes = ["int4", "bf16", "fp16"]\nreference = "fp16"'))
    assert [cell.label for cell in found.cells] == ["fp16", "int4 group_size=128", "bf16"]
    assert found.combinations == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('schemes = ["int4"]', "recipe .*: model is missing"),
        ('model = "m"\nschemes = []', "schemes .*at least 1"),
        ('model = "m"\nscheme = ["int4"]', "unknown key scheme. Did you mean 'schemes'"),
        ('model = "m"\nschemes = ["int4"]\n[text]\nlimits = 3', "unknown key text.limits. Did you mean 'limit'"),
        ('model = "m"\nschemes = [{name = "int4", option = {}}]', "unknown key schemes.1.option. Did you mean 'options'"),
        ('model = "m"\nschemes = ["int4"]\nseeds = [0, -1]', "seeds.2 must be greater than or equal to 0, got -1"),
        ('model = "m"\nschemes = ["int4"]\nseeds = [1, 2, 1]', "seeds names 1 twice"),
        ('model = "m"\nschemes = ["int4", "int8-dynamic", "int4"]', "schemes names int4 twice"),
        ('model = "m"\nschemes = ["int4"]\ncalibration = [{name = "a"}, {name = "a"}]', "calibration names a twice"),
        ('model = "m"\nschemes = ["int4"]\ncalibration = [{name = "../a"}]', "calibration.1.name"),
        ('model = "m"\nschemes = ["int4"]\nreference = "int4"', "reference must be 'bf16', 'fp16' or 'fp32'"),
        ("model = ", "is not TOML"),
    ],
)
def test_a_recipe_that_is_wrong_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        recipe(tmp_path, text)


def test_schemes_and_options_are_known_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown scheme 'int4-gtpq'\. Did you mean 'int4-gptq'"):
        cells_of(recipe(tmp_path, 'model = "m"\nschemes = ["int4-gtpq"]'))
    with pytest.raises(UsageError, match="option group_size of scheme int4 must be"):
        cells_of(recipe(tmp_path, 'model = "m"\nschemes = ["int4"]\ngroup_sizes = [48]'))
    with pytest.raises(UsageError, match="scheme int4 has no option 'damp'"):
        cells_of(recipe(tmp_path, 'model = "m"\nschemes = [{ name = "int4", options = { damp = 1 } }]'))


def test_bench_is_a_switch_or_a_table(tmp_path: Path) -> None:
    start = 'model = "m"\nschemes = ["int4"]\n'
    assert recipe(tmp_path, start).speed() is None
    assert recipe(tmp_path, start + "bench = false").speed() is None
    assert recipe(tmp_path, start + "bench = true").speed().repeats == 5
    assert recipe(tmp_path, start + "[bench]\nrepeats = 2").speed().repeats == 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    found = read_recipe(path)
    assert (path.parent / found.model).exists()
    assert len(cells_of(found).cells) > 1


NLL = {"bf16": [2.0, 4.0, 1.0, 3.0], 0: [2.5, 4.5, 1.0, 3.0], 1: [3.0, 4.0, 2.0, 4.0]}
KL = {"bf16": [0.0] * 4, 0: [0.2, 0.0, 0.4, 0.2], 1: [0.4, 0.0, 0.0, 0.8]}


def made(scheme: str, which: str | int, *, size: int, speed: float | None = None) -> list[ResultRecord]:
    """Records of a cell on two windows of two tokens."""
    options = {} if scheme == "bf16" else {"group_size": 32, "calibration": "a", "calibration_seed": which}
    subject = Subject(model="tiny", checkpoint_sha256="ab", scheme=scheme, options=options, bits_per_weight=4.5, size_bytes=size)
    here = Environment(
        llmq="0", python="3", packages={}, platform="", cpu="c", cpu_features=[], cores=1, threads=1, device="cpu", memory_bytes=1
    )
    tokens = TokenFigures(
        np.array(NLL[which], np.float32),
        np.array([2, 2], np.int32),
        np.array(KL[which], np.float32),
        np.array([1, 1, 0, 1], bool),
    )

    def record(kind: Kind, metrics: dict[str, Metric]) -> ResultRecord:
        return ResultRecord(
            kind=kind, subject=subject, protocol=Protocol(name="windows", version=1), metrics=metrics, environment=here
        )

    found = [
        record("perplexity", {"perplexity": Metric(value=1.0, unit="1")}).with_tokens(tokens),
        record("divergence", {"kl_mean": Metric(value=1.0, unit="nats/token")}).with_tokens(tokens),
    ]
    if speed is not None:
        found.append(record("decode", {"tokens_per_s": Metric(value=speed, unit="tokens/s", stderr=3.0)}))
    return found


def test_seeds_are_joined() -> None:
    records = [*made("bf16", "bf16", size=100), *made("int4-gptq", 0, size=30), *made("int4-gptq", 1, size=30)]
    reference, row = matrix_rows(records, "bf16")
    assert reference.metrics["kl_mean"].value == reference.metrics["delta_ln_perplexity"].stderr == 0
    assert (reference.seeds, row.seeds) == ((), (0, 1))
    assert row.label == "int4-gptq group_size=32"
    kl, delta = row.metrics["kl_mean"], row.metrics["delta_ln_perplexity"]
    # over the seeds the tokens' KL is 0.3, 0.0, 0.2, 0.5: windows of sum 0.3 and 0.7, the mean 0.25, residuals -0.2 and 0.2
    assert kl.value == pytest.approx(0.25)
    assert kl.stderr == pytest.approx(math.sqrt(2 / 1 * (0.2**2 + 0.2**2)) / 4)
    assert kl.spread == pytest.approx(math.sqrt(2) * 0.05)  # of the means 0.2 and 0.3
    # the tokens' difference is 0.75, 0.25, 0.5, 0.5: both windows of sum 1, so that the text leaves no error
    assert (delta.value, delta.stderr) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    assert delta.spread == pytest.approx(0.5 / math.sqrt(2))  # of the means 0.25 and 0.75
    assert row.metrics["ln_perplexity"].value == pytest.approx(3.0)
    table = matrix_table([reference, row], records)
    assert table.title == "tiny: 3 cells in 2 rows"
    cells = dict(zip([column.heading for column in table.columns], table.rows[1], strict=True))
    assert cells["KL (nats/token)"] == "0.25 ± 0.10"
    assert (cells["n"], cells["seeds, KL"], cells["Pareto"]) == ("2", "± 0.071", "size")


def test_fronts_are_of_means_against_size_and_speed() -> None:
    records = [
        *made("bf16", "bf16", size=100, speed=10.0),
        *made("int4-gptq", 0, size=30, speed=20.0),
        *made("int4-gptq", 1, size=30, speed=40.0),
        *made("int4-awq", 1, size=30, speed=30.0),  # KL 0.3: as small, as fast, and worse
        *made("int3-gptq", 1, size=20, speed=25.0),  # worse and slower, and smaller
    ]
    rows = {row.subject.scheme: row for row in matrix_rows(records, "bf16")}
    assert {name: row.fronts for name, row in rows.items()} == {
        "bf16": ["size", "speed"],
        "int4-gptq": ["size", "speed"],
        "int4-awq": [],
        "int3-gptq": ["size"],
    }
    speed = rows["int4-gptq"].metrics["decode_tokens_per_s"]
    assert (speed.value, speed.stderr) == (30.0, pytest.approx(3 / math.sqrt(2)))
    assert rows["int4-gptq"].to_json()["calibration"] == "a"
