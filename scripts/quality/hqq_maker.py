"""HQQ (half-quadratic quantization, data-free), by its own package. Runs in the environment `hqq`."""

from __future__ import annotations

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from quality.exchange import Made, Order, group_bits, hand_over, timed, versions_of
from quality.torch_model import linears, load, state


def main() -> None:
    """Quantize as the order says: nbits, group_size."""
    order = Order.read()
    model = load(order)
    config = BaseQuantizeConfig(axis=1, **order.settings)
    dense: dict[str, torch.Tensor] = {}
    with timed() as cost:
        for name, linear in linears(model).items():
            layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            dense[name] = layer.dequantize()
    # scales and zeros are kept in the compute dtype, which is 16 bits wherever HQQ runs a model
    bits = group_bits(order.settings["nbits"], order.settings["group_size"], zero=16)
    hand_over(Path(order.out), state(model, dense), Made(bits, cost, versions_of("hqq", "torch", "transformers")))


if __name__ == "__main__":
    main()
