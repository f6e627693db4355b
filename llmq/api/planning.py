"""What a quantization would do, from the checkpoint's headers alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmq.api.calibrating import DEFAULT_WINDOWS, context_window
from llmq.api.loading import Setup
from llmq.api.recipes import Recipe, settle
from llmq.checkpoint import open_checkpoint
from llmq.errors import UsageError
from llmq.model.kv_cache import kv_bytes_per_token, kv_name
from llmq.model.llama import Llama
from llmq.results.coverage import Coverage
from llmq.schemes.cover import coverage


@dataclass(frozen=True)
class Plan:
    """Every weight as it would be stored, the totals, and the memory that quantizing would need at most."""

    model: str
    scheme: str
    options: dict[str, Any]
    coverage: Coverage
    source_bytes: int
    peak_bytes: int
    peak_parts: dict[str, int]
    """What `peak_bytes` is the sum of."""
    context_tokens: int
    kv_bytes_per_token: dict[str, int]
    """What a token of a sequence takes in a KV cache of the compute dtype, and of int8, by the cache's name."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        own = ("model", "scheme", "options", "source_bytes", "peak_bytes", "peak_parts", "context_tokens", "kv_bytes_per_token")
        totals = {"total_bytes": self.coverage.nbytes, "bits_per_weight": self.coverage.bits_per_weight}
        return {name: getattr(self, name) for name in own} | totals | {"weights": self.coverage.to_json()["rows"]}


def plan_quantization(path: str, recipe: Recipe, setup: Setup) -> Plan:
    """Predict what `quantize_checkpoint` would write.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ShapeError: linears do not fit the scheme's grid; names all of them.
        UsageError: the checkpoint is quantized already, or a skip pattern matches nothing.
    """
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
    parts = {
        "the result": covered.nbytes,
        "fp32 copies of the largest weight": 3 * 4 * max(row.elements for row in covered.rows),
    }
    if settled.needs_calibration:
        config, source = checkpoint.config, recipe.calibration
        tokens = (source.windows or DEFAULT_WINDOWS) * (source.length or context_window(config))
        widest = max(row.shape[-1] for row in covered.quantized)
        parts["calibration activations"] = 2 * tokens * config.hidden_size * torch.float32.itemsize
        parts["Hessian of the widest linear and its factors"] = 4 * widest * widest * torch.float64.itemsize
    return Plan(
        model=path,
        scheme=resolved.name,
        options=resolved.options_json(),
        coverage=covered,
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        peak_bytes=sum(parts.values()),
        peak_parts=parts,
        context_tokens=checkpoint.config.max_position_embeddings,
        kv_bytes_per_token={kv_name(each): kv_bytes_per_token(checkpoint.config, each) for each in (dtype, torch.int8)},
    )
