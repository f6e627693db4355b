"""llmq: which quantization of a Llama checkpoint to ship, and what it costs.

    llmq.quantize_(module, "int4")                   any nn.Module, in place
    llmq.load(path, llmq.Recipe("int4-gptq"))        a checkpoint, quantized and ready to run
    llmq.quantize(path, recipe, setup, out)          … and written
    llmq.evaluate(path), llmq.bench(path, …), llmq.compare(request)

Importing llmq imports none of this: each name is loaded when it is first used (PEP 562), torch with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "quantize_": ("llmq.schemes.apply", "quantize_"),
    "prepare": ("llmq.ops.select", "prepare"),
    "QuantizedTensor": ("llmq.ops.tensor", "QuantizedTensor"),
    "load": ("llmq.api.loading", "open_model"),
    "Recipe": ("llmq.api.recipes", "Recipe"),
    "Setup": ("llmq.api.loading", "Setup"),
    "calibrate": ("llmq.api.calibrating", "record_calibration"),
    "quantize": ("llmq.api.quantizing", "quantize_checkpoint"),
    "evaluate": ("llmq.api.evaluating", "evaluate_model"),
    "Question": ("llmq.api.evaluating", "Question"),
    "bench": ("llmq.api.benching", "bench_tokens"),
    "compare": ("llmq.api.comparing", "compare_schemes"),
    "CompareRequest": ("llmq.api.comparing", "CompareRequest"),
    "generate": ("llmq.api.generating", "complete"),
}

if TYPE_CHECKING:
    from llmq.api.benching import bench_tokens as bench
    from llmq.api.calibrating import record_calibration as calibrate
    from llmq.api.comparing import CompareRequest
    from llmq.api.comparing import compare_schemes as compare
    from llmq.api.evaluating import Question
    from llmq.api.evaluating import evaluate_model as evaluate
    from llmq.api.generating import complete as generate
    from llmq.api.loading import Setup
    from llmq.api.loading import open_model as load
    from llmq.api.quantizing import quantize_checkpoint as quantize
    from llmq.api.recipes import Recipe
    from llmq.ops.select import prepare
    from llmq.ops.tensor import QuantizedTensor
    from llmq.schemes.apply import quantize_

__all__ = [
    "CompareRequest",
    "QuantizedTensor",
    "Question",
    "Recipe",
    "Setup",
    "__version__",
    "bench",
    "calibrate",
    "compare",
    "evaluate",
    "generate",
    "load",
    "prepare",
    "quantize",
    "quantize_",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
