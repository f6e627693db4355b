"""What the makers that quantize a transformers model share: loading it, its windows, its weights."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from quality.exchange import Order, is_handed_over


def load(order: Order) -> Any:
    """Load the original in float32; sets the threads too."""
    torch.set_num_threads(order.threads)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_pretrained(order.checkpoint, dtype=torch.float32).eval()


def windows(order: Order) -> torch.Tensor:
    """Return the calibration windows, int64 [windows, length]."""
    assert order.windows is not None
    with safe_open(order.windows, framework="pt") as file:
        tokens: torch.Tensor = file.get_tensor("tokens")
    return tokens.long()


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules that stand where the blocks' linears were, by name, whatever a tool has put there."""
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {name: module for name, module in model.named_modules() if name.startswith("model.layers.") and name.endswith(ends)}


def state(model: torch.nn.Module, dense: dict[str, torch.Tensor] | None = None) -> dict[str, np.ndarray]:
    """Return what is handed over: the model's parameters, with `dense` weights in the place of linears that have none.

    Args:
        model: after quantization.
        dense: float weights by the name of the linear; None where the linears have plain weights still.
    """
    found = {name: value for name, value in model.state_dict().items() if is_handed_over(name) and name.endswith(".weight")}
    found |= {f"{name}.weight": weight for name, weight in (dense or {}).items()}
    return {name: value.detach().float().cpu().numpy() for name, value in found.items()}
