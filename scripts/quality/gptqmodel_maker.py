"""GPTQ and GPTAQ as GPTQModel has them. Runs in the environment `gptqmodel`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from quality.exchange import Made, Order, group_bits, hand_over, timed, versions_of
from quality.torch_model import linears, state, windows

ABSENT = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def import_gptqmodel() -> Any:
    """Import it without torchvision, which it names for one vision model and which has no build for this torch."""
    transformers.utils.is_torchvision_available()  # settled before the empty modules are there
    empty: dict[str, Any] = {name: ModuleType(name) for name in ABSENT}
    empty[ABSENT[2]].InterpolationMode = object
    empty[ABSENT[0]].transforms, empty[ABSENT[1]].functional = empty[ABSENT[1]], empty[ABSENT[2]]
    sys.modules.update(empty)
    try:
        import gptqmodel
    finally:
        for name in ABSENT:
            del sys.modules[name]
    return gptqmodel


def dequantized(module: Any) -> torch.Tensor:
    """Return the weight [N, K] of a quantized linear, which has it as [K, N]."""
    weight: torch.Tensor = module.dequantize_weight().T
    return weight


def main() -> None:
    """Quantize as the order says: dtype, bits, group_size, sym, gptaq (its alpha), and what GPTQModel's configuration takes."""
    order = Order.read()
    torch.set_num_threads(order.threads)
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its pools refuse to start with the one that it takes on two cores
    library = import_gptqmodel()
    from gptqmodel.quantization.config import GPTAQConfig

    settings = dict(order.settings)
    alpha = settings.pop("gptaq", None)
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    more = {} if alpha is None else {"gptaq": GPTAQConfig(alpha=alpha)}
    config = library.QuantizeConfig(device="cpu", offload_to_disk=False, **settings, **more)
    model = library.GPTQModel.load(order.checkpoint, config, dtype=dtype)
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows(order)]
    with timed() as cost:
        model.quantize(calibration, batch_size=8, backend=library.BACKEND.TORCH)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        restored = library.GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=library.BACKEND.TORCH)
    dense = {name: dequantized(held) for name, held in linears(restored.model).items()}
    zero = 0 if settings["sym"] else settings["bits"]
    bits = group_bits(settings["bits"], settings["group_size"], zero=zero)
    made = Made(bits, cost, versions_of("gptqmodel", "torch", "transformers"), order.settings)
    hand_over(Path(order.out), state(restored.model, dense), made)


if __name__ == "__main__":
    main()
