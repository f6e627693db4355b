"""What a quantization would do and need, from the checkpoint's headers; its time, from the first block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from llmq.api.calibrating import DEFAULT_WINDOWS, context_window
from llmq.api.footprint import Windows, device_parts, peak_parts
from llmq.api.loading import Setup
from llmq.api.recipes import Recipe, settle
from llmq.api.timing import Timing, measure_time
from llmq.calibration.activations import HOST, Spill, activation_dtype
from llmq.checkpoint import open_checkpoint
from llmq.errors import UsageError
from llmq.model.kv_cache import kv_bytes_per_token, kv_name
from llmq.model.llama import Llama
from llmq.progress import SILENT, Progress
from llmq.results.coverage import Coverage
from llmq.schemes.cover import coverage


@dataclass(frozen=True)
class Plan:
    """Every weight as it would be stored, the totals, and the memory and time that quantizing would take."""

    model: str
    scheme: str
    options: dict[str, Any]
    coverage: Coverage
    source_bytes: int
    peak_bytes: int
    peak_parts: dict[str, int]
    """What `peak_bytes` is the sum of."""
    device_parts: dict[str, int] | None
    """The same of the GPU's memory; None where none is used."""
    timing: Timing | None
    """None where nothing was measured."""
    context_tokens: int
    kv_bytes_per_token: dict[str, int]
    """What a token of a sequence takes in a KV cache of the compute dtype, and of int8, by the cache's name."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        own = (
            "model",
            "scheme",
            "options",
            "source_bytes",
            "peak_bytes",
            "peak_parts",
            "device_parts",
            "context_tokens",
            "kv_bytes_per_token",
        )
        totals = {"total_bytes": self.coverage.nbytes, "bits_per_weight": self.coverage.bits_per_weight}
        timing = asdict(self.timing) | {"total": self.timing.total} if self.timing is not None else None
        own_values = {name: getattr(self, name) for name in own}
        return own_values | totals | {"seconds": timing} | {"weights": self.coverage.to_json()["rows"]}


def plan_quantization(
    path: str,
    recipe: Recipe,
    setup: Setup,
    *,
    activations: str = "bf16",
    spill: Spill = None,
    measure: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Predict what `quantize_checkpoint` would write and need.

    Args:
        path: the checkpoint.
        recipe: see `quantize_checkpoint`.
        setup: see `quantize_checkpoint`; this machine need not have the device unless `measure` is asked for.
        activations: see `WalkSettings`.
        spill: see `WalkSettings`.
        measure: quantize the first block in a temporary folder, to predict the time; otherwise no weight is read.
        progress: told of what is measured.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ShapeError: linears do not fit the scheme's grid; names all of them.
        UsageError: the checkpoint is quantized already, a skip pattern matches nothing, or there is no such device.
    """
    setup.check_device()
    checkpoint = open_checkpoint(path)
    if checkpoint.manifest is not None:
        raise UsageError(f"{path} is quantized already (scheme {checkpoint.manifest.scheme}); name the original checkpoint.")
    with torch.device("meta"):
        model = Llama(checkpoint.config).to(checkpoint.dtype)
    settled = settle(recipe, model, setup.torch_dtype)
    resolved = settled.resolved
    dtype = resolved.baseline_dtype or setup.torch_dtype
    dtypes = {decision.fqn: decision.parameter.dtype for decision in settled.decisions}
    planned = coverage(resolved.name, settled.decisions, dtypes=dtypes, noise={}, compute=dtype)
    covered = recipe.explain(planned)
    count = length = 0
    if settled.needs_calibration:
        source = recipe.calibration
        count, length = source.windows or DEFAULT_WINDOWS, source.length or context_window(checkpoint.config)
    place: Literal["model", "host", "disk"] = "model" if spill is None else "host" if spill == HOST else "disk"
    windows = Windows(count * length, length, activation_dtype(activations).itemsize, place)
    held, on_device = (checkpoint.config, settled.decisions, windows), setup.device != "cpu"
    parts = peak_parts(*held, source_itemsize=dtype.itemsize, on_device=on_device)
    timing = None
    if measure:
        timing = measure_time(checkpoint, recipe, setup, activations=activations, spill=spill, progress=progress)
    return Plan(
        model=path,
        scheme=resolved.name,
        options=resolved.options_json(),
        coverage=covered,
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        peak_bytes=sum(parts.values()),
        peak_parts=parts,
        device_parts=device_parts(*held, source_itemsize=dtype.itemsize) if on_device else None,
        timing=timing,
        context_tokens=checkpoint.config.max_position_embeddings,
        kv_bytes_per_token={kv_name(each): kv_bytes_per_token(checkpoint.config, each) for each in (dtype, torch.int8)},
    )
