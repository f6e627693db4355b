"""`llmq quantize --device` from disk to disk: the same bytes as on the CPU, a part at a time on the device, and nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_device import EMULATED, MEMORY, nothing_left
from gpu.quantizing import compare, quantize_both
from safetensors.torch import save_file

from llmq.api.calibrating import CalibrationSource
from llmq.api.explaining import LayersRequest, explain_layers
from llmq.api.loading import Setup, open_model
from llmq.api.planning import plan_quantization
from llmq.api.quantizing import Running, quantize_checkpoint
from llmq.api.recipes import Recipe
from llmq.calibration.activations import HOST
from llmq.checkpoint import open_checkpoint
from llmq.checkpoint.complete import parameter_shapes
from llmq.checkpoint.job import Job
from llmq.errors import Interrupted, UsageError
from llmq.model.config import LlamaConfig
from llmq.ops.tensor import QuantizedTensor

SAMPLE = Path(__file__).parent.parent.parent / "llmq" / "assets" / "sample"
TEXT = CalibrationSource(str(SAMPLE / "calibration.txt"), 8, 32, eval_text=str(SAMPLE / "evaluation.txt"))
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(wt2_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that writes a small random checkpoint with the bundled one's tokenizer."""

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("models") / "model"
        shutil.copytree(wt2_8m, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text()) | SMALL | {"num_hidden_layers": 2} | changes
        (folder / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, shape in parameter_shapes(LlamaConfig.from_hf(config)).items():
            noise = torch.randn(shape, generator=generator)
            tensors[name] = (1 + 0.2 * noise if "norm" in name else noise / shape[-1] ** 0.5).bfloat16()
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def quantize(
    model: Path, scheme: str, device: str, out: Path, options: dict[str, Any] | None = None, **how: Any
) -> dict[str, bytes]:
    """Quantize on a device; return the files of weights."""
    recipe = Recipe(scheme, options or {}, calibration=TEXT, rotate=how.pop("rotate", "none"))
    quantize_checkpoint(str(model), recipe, Setup(device=device, threads=1), out, how=Running(force=True, **how))
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


JOBS: list[tuple[str, dict[str, Any], str]] = [
    ("int4", {"group_size": 32, "search": "range"}, "none"),
    ("int8-dynamic", {}, "both"),
    ("int4-gptq", {"group_size": 32, "sweeps": 0, "search": "range"}, "none"),
    ("int3-best", {"group_size": 32, "sweeps": 0, "search": "range", "distill_epochs": 1}, "none"),
]


@pytest.mark.parametrize(("scheme", "options", "rotate"), JOBS)
def test_a_job_writes_the_same_bytes(scheme: str, options: dict[str, Any], rotate: str, checkpoint: Make, tmp_path: Path) -> None:
    model = checkpoint(tie_word_embeddings=scheme == "int4")
    here = quantize(model, scheme, "cpu", tmp_path / "cpu", options, rotate=rotate)
    with nothing_left():
        assert quantize(model, scheme, EMULATED, tmp_path / "device", options, rotate=rotate) == here
    manifests = [open_checkpoint(tmp_path / name).manifest for name in ("cpu", "device")]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert (manifests[0].device, manifests[1].device) == ("cpu", EMULATED)
    assert manifests[0] == manifests[1].model_copy(update={"device": "cpu"})


def test_a_job_goes_on_where_it_was_stopped_and_only_on_its_device(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = checkpoint(), JOBS[2][1]
    whole = quantize(model, "int4-gptq", EMULATED, tmp_path / "whole", options)
    store = Job.store

    def stopped(job: Job, part: str, *arguments: Any) -> None:
        if part.endswith("layers.1"):
            raise KeyboardInterrupt
        store(job, part, *arguments)

    monkeypatch.setattr(Job, "store", stopped)
    with pytest.raises(Interrupted, match="2 parts are finished"):
        quantize(model, "int4-gptq", EMULATED, tmp_path / "out", options)
    monkeypatch.undo()
    monkeypatch.setattr("llmq.api.loading.DEVICES", ("cpu", EMULATED))
    with pytest.raises(UsageError, match=f'device was "{EMULATED}", is "cpu"'):
        quantize(model, "int4-gptq", "cpu", tmp_path / "out", options)
    with nothing_left():
        assert quantize(model, "int4-gptq", EMULATED, tmp_path / "out", options) == whole


def test_memory_is_that_of_a_block_whatever_the_number_of_blocks(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options, held = checkpoint(num_hidden_layers=3, intermediate_size=512), JOBS[2][1], {}
    store = Job.store

    def noting(job: Job, part: str, *arguments: Any) -> None:
        held[part] = MEMORY.live
        store(job, part, *arguments)

    monkeypatch.setattr(Job, "store", noting)
    with nothing_left() as memory:
        before = memory.live
        quantize(model, "int4-gptq", EMULATED, tmp_path / "out", options, spill=HOST)
        peak = memory.peak - before
    blocks = [live for part, live in held.items() if ".layers." in part]
    assert len(blocks) == 3
    assert len(set(blocks)) == 1
    planned = plan_quantization(str(model), Recipe("int4-gptq", options, calibration=TEXT), Setup(device=EMULATED), spill=HOST)
    assert planned.device_parts is not None
    assert not any("hidden states" in what for what in planned.device_parts)
    assert 0.6 < peak / sum(planned.device_parts.values()) < 1.5  # panels of a fixed width are large beside 512 inputs


def test_a_model_is_opened_on_the_device(checkpoint: Make) -> None:
    with nothing_left():
        loaded = open_model(
            str(checkpoint()), Recipe("int4-gptq", JOBS[2][1], calibration=TEXT, rotate="both"), Setup(device=EMULATED, threads=1)
        )
        assert loaded.setup.device_name == EMULATED
        for name, parameter in loaded.model.named_parameters():
            tensors = parameter.stored if isinstance(parameter, QuantizedTensor) else (parameter,)
            assert {tensor.device.type for tensor in tensors} == {EMULATED}, name
        del loaded, parameter, tensors


def test_a_loss_is_explained_on_the_device(checkpoint: Make) -> None:
    model, scheme = str(checkpoint()), Recipe("int4-awq", {"group_size": 32, "exponents": 2}, calibration=TEXT)
    request = LayersRequest(2, 1, str(SAMPLE / "evaluation.txt"), 32, ("int3-gptq:group_size=32,sweeps=0",), calibration=TEXT)
    found = []
    for device in ("cpu", EMULATED):
        setup = Setup(device, "fp32", threads=1, kernel="reference", runtime="torch")
        with nothing_left():
            found.append(explain_layers(model, request, scheme, setup))
    for mine, its in zip(found[0].linears, found[1].linears, strict=True):
        assert (mine.fqn, mine.sqnr_db, mine.error) == (its.fqn, its.sqnr_db, its.error)
        assert torch.equal(mine.cost.kl, its.cost.kl)
    assert [(pick.fqn, pick.left) for pick in found[0].picks] == [(pick.fqn, pick.left) for pick in found[1].picks]


def test_what_a_gpu_may_differ_by_is_told(checkpoint: Make, tmp_path: Path) -> None:
    """The comparison that is made on GPUs finds nothing where nothing differs, and other codes where the windows are others."""
    model, options = checkpoint(), JOBS[2][1]
    same = quantize_both(model, "int4-gptq", options, TEXT, tmp_path, device=EMULATED)
    assert same.broken() == []
    assert set(same.codes.values()) == set(same.losses.values()) == {0.0}
    others = CalibrationSource(str(SAMPLE / "calibration.txt"), 3, 32, eval_text=str(SAMPLE / "evaluation.txt"))
    other = tmp_path / "other"
    quantize_checkpoint(str(model), Recipe("int4-gptq", options, calibration=others), Setup(threads=1), other)
    told = compare(tmp_path / "cpu", other, memory=2.0).broken()
    assert any("of the codes of model.layers.0" in sentence for sentence in told)
    assert any("the loss of" in sentence for sentence in told)
    assert told[-1] == "the GPU's memory rose to 2.00 of what was predicted"
