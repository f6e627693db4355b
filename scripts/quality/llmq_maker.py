"""llmq itself, by its own command line. Runs in llmq's environment.

The artefact that `llmq quantize` writes is kept in the folder: it is evaluated as it is when it quantizes activations too, which
plain weights cannot show, or when it is rotated, which changes the embedding and the head.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llmq import __version__
from llmq.checkpoint import load_model, open_checkpoint
from llmq.cli.app import app
from llmq.numerics.grid import IntGrid, format_from_json
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.cover import describe_format
from quality.exchange import ARTEFACT, Made, Order, hand_over, is_handed_over, timed, versions_of


def main() -> None:
    """Quantize as the order says: scheme, set (options of the scheme), words (further options of `llmq quantize`)."""
    import llmq.api.quantizing  # noqa: F401 - imported by the command; its time is not that of quantizing

    order = Order.read()
    settings, out = order.settings, Path(order.out) / ARTEFACT
    command = ["quantize", order.checkpoint, "--scheme", settings["scheme"], "--out", str(out), "--threads", str(order.threads)]
    command += [word for name, value in settings["set"].items() for word in ("-S", f"{name}={value}")]
    command += ["--calibration", order.windows] if order.windows else []
    with timed() as cost:
        app([*command, *settings["words"]], standalone_mode=False)
    checkpoint = open_checkpoint(str(out))
    assert checkpoint.manifest is not None
    model = load_model(checkpoint, dtype=torch.float32)
    weights: dict[str, torch.Tensor] = {}
    stored = elements = 0
    dynamic = False
    for name, parameter in model.named_parameters():
        integer = isinstance(parameter, QuantizedTensor) and isinstance(parameter.format.weight, IntGrid)
        if isinstance(parameter, QuantizedTensor) and integer:
            stored, elements = stored + 8 * parameter.nbytes_stored, elements + parameter.numel()
            dynamic |= parameter.format.activation is not None
        if is_handed_over(name):
            weights[name] = (parameter.dequantize() if isinstance(parameter, QuantizedTensor) else parameter).detach().float()
        else:
            assert not integer, name  # embeddings and head stay untouched
    notes = [f"{report['fqn']}: {report['fallback']}" for report in checkpoint.manifest.layers if report.get("fallback")]
    others = {report["fqn"]: report["format"] for report in checkpoint.manifest.layers if report.get("format")}
    notes += [f"{fqn} became {describe_format(format_from_json(form))}" for fqn, form in others.items()]
    notes += [f"{fqn} left alone: {why}" for fqn, why in checkpoint.manifest.skipped.items() if fqn != "lm_head"]
    rotation = checkpoint.manifest.rotation
    resolved = {"options": checkpoint.manifest.options, "activations": dynamic, "rotation": rotation}
    made = Made(stored / elements, cost, {"llmq": __version__, **versions_of("torch")}, resolved, notes)
    hand_over(Path(order.out), {name: weight.numpy() for name, weight in weights.items()}, made)


if __name__ == "__main__":
    main()
