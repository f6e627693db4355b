"""AutoRound (arXiv:2309.05516), by its own package. Runs in the environment `autoround`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from auto_round import AutoRound

from quality.exchange import Made, Order, group_bits, hand_over, timed, versions_of
from quality.torch_model import linears, load, state, windows


def main() -> None:
    """Quantize as the order says: bits, group_size, sym and iters, and whatever else AutoRound takes."""
    order = Order.read()
    model, tokens = load(order), windows(order)
    # every window is full, so that the tokenizer is asked for nothing but its padding token
    tokenizer: Any = SimpleNamespace(pad_token_id=None, pad_token=None)
    settings = {"batch_size": 8, "amp": False, **order.settings}
    quantizer = AutoRound(
        model,
        tokenizer=tokenizer,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[row[None] for row in tokens],
        device_map="cpu",
        enable_torch_compile=False,
        **settings,
    )
    with timed() as cost:
        done = quantizer.quantize()
    result = done[0] if isinstance(done, tuple) else done
    assert all(type(module) is torch.nn.Linear for module in linears(result).values())  # with weights that codes can mean
    zero = 0 if settings["sym"] else settings["bits"]
    bits = group_bits(settings["bits"], settings["group_size"], zero=zero)
    versions = versions_of("auto-round", "torch", "transformers")
    hand_over(Path(order.out), state(result), Made(bits, cost, versions, settings))


if __name__ == "__main__":
    main()
