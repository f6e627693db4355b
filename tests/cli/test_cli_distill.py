"""Distillation as the last phase: of a job's finished parts, of a model in memory, of a tied model, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runs import run_llmq

import llmq
from llmq.api.calibrating import CalibrationSource
from llmq.checkpoint import load_model, open_checkpoint

BEST = ("-s", "int4-best", "-S", "group_size=32", "-S", "sweeps=1", "-S", "distill_epochs=2", "-S", "distill_rate=0.001")


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory, wt2_8m: Path) -> dict[bool, Path]:
    """Two-layer models with their own and with a tied head."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import make_random_checkpoint

    folder = tmp_path_factory.mktemp("random")
    made = {}
    for tied in (False, True):
        made[tied] = folder / ("tied" if tied else "untied")
        shape = "--hidden-size 64 --intermediate-size 96 --layers 2 --heads 4 --kv-heads 2 --context 64 --vocab-size 4096"
        arguments = [str(made[tied]), *shape.split(), "--tokenizer-from", str(wt2_8m), *(["--tied"] if tied else [])]
        make_random_checkpoint.main(arguments)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_job_distills_as_a_model_in_memory_does(
    random_checkpoint: dict[bool, Path], calibration_text: Path, tmp_path: Path, *, tied: bool
) -> None:
    model = random_checkpoint[tied]
    calibration = ("--calibration", calibration_text, "--calibration-windows", 48, "--calibration-length", 32)
    run_llmq("quantize", model, *BEST, *calibration, "-o", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "llmq.json").read_text())
    report = manifest["distillation"]
    assert report["windows"] + report["held_out"] == 48
    looks = [look["held_out_kl"] for look in report["evaluations"]]
    assert looks[report["best"]] == min(looks)
    assert report["best"] > 0  # a random model's scales can always be trained
    assert not (tmp_path / "out.partial").exists()
    source = CalibrationSource(str(calibration_text), windows=48, length=32)
    options = {"group_size": 32, "sweeps": 1, "distill_epochs": 2, "distill_rate": 0.001}
    kept = llmq.load(str(model), llmq.Recipe("int4-best", options, calibration=source), llmq.Setup(runtime="torch"))
    assert json.loads(json.dumps(kept.distillation)) == report
    tokens = torch.arange(32)[None] * 5 + 3
    with torch.no_grad():
        read = load_model(open_checkpoint(tmp_path / "out"))(tokens)
        torch.testing.assert_close(kept.model(tokens), read, rtol=0, atol=0.05 * read.abs().max().item())


@pytest.mark.slow
def test_a_distillation_that_failed_is_done_again(
    random_checkpoint: dict[bool, Path], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = ("--calibration", calibration_text, "--calibration-windows", 48, "--calibration-length", 32)
    arguments = ("quantize", random_checkpoint[False], *BEST, *calibration)
    run_llmq(*arguments, "-o", tmp_path / "whole")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmq.api.distilling.distill", stop)
        stopped = run_llmq(*arguments, "-o", tmp_path / "again", code=130)
    assert "goes on from there" in stopped.output
    run_llmq(*arguments, "-o", tmp_path / "again")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
