"""What can be measured: an engine with weights of one kind, each under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmq.errors import UsageError, suggest

CHECKPOINT = ""
"""Weights that are the checkpoint's own folder."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One engine with one kind of weights.

    Attributes:
        name: as `--engines` takes it.
        environment: whose Python runs it: a name in configs/peers, or 'llmq' for this one.
        worker: module of the worker in this package, or a file.
        bits: of the weights, nominally; only variants of equal bits are compared.
        maker: module that writes the weights, or `CHECKPOINT`.
        kind: the maker's name for the weights.
        source: what the maker reads: the kind of other weights, or `CHECKPOINT`.
        head: what the head's weight is, where the worker cannot see it.
        options: the worker's own.
        about: what a reader of the table should know.
    """

    name: str
    environment: str
    worker: str
    bits: int
    maker: str = CHECKPOINT
    kind: str = CHECKPOINT
    source: str = CHECKPOINT
    head: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""

    @property
    def is_llmq(self) -> bool:
        """Whether it is ours."""
        return self.environment == "llmq"


def _llmq(scheme: str, bits: int, **options: Any) -> Variant:
    return Variant(f"llmq-{scheme}", "llmq", "llmq_engine", bits, options={"scheme": scheme, "set": options})


def _llama_cpp(kind: str, bits: int, about: str = "") -> Variant:
    source = CHECKPOINT if kind == "bf16" else "bf16"
    return Variant(f"llama.cpp-{kind}", "llama_cpp", "llama_cpp_engine", bits, "gguf_weights", kind, source, about=about)


def _openvino(kind: str, bits: int, about: str) -> Variant:
    return Variant(f"openvino-{kind}", "openvino", "openvino_engine", bits, "openvino_weights", kind, head=kind, about=about)


def _transformers(library: str | None, bits: int, head: str) -> Variant:
    name = f"{library}-int{bits}" if library else "transformers-bf16"
    return Variant(name, "transformers", "transformers_engine", bits, head=head, options={"library": library})


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        _llmq("bf16", 16),
        _llama_cpp("bf16", 16),
        _transformers(None, 16, "bf16"),
        _llmq("int8-weight-only", 8),
        _llmq("int8-dynamic", 8),
        _llama_cpp("q8_0", 8),
        _openvino("int8", 8, "symmetric, a scale a row"),
        _transformers("torchao", 8, "int8"),
        _transformers("quanto", 8, "int8"),
        _llmq("int4", 4, group_size=128),
        _llmq("int8-dynamic-int4", 4, group_size=128),
        _llama_cpp("q4_0", 4, "groups of 32, head in Q4_0 too"),
        _llama_cpp("q4_k_m", 4, "llama.cpp's own mix, head in Q6_K"),
        _openvino("int4", 4, "symmetric, groups of 128"),
        Variant("onnx-int4", "onnx", "onnx_engine", 4, "onnx_weights", "int4", head="int4", about="symmetric, groups of 128"),
        _transformers("torchao", 4, "int4"),
        _transformers("quanto", 4, "int4"),
    )
}


def choose(names: list[str]) -> list[Variant]:
    """Return the named variants, those of equal bits together, in the order of the catalogue.

    Raises:
        UsageError: a name is unknown, or none of them is llmq's.
    """
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"unknown engine {name!r}.{suggest(name, list(VARIANTS))}")
    chosen = [variant for name, variant in VARIANTS.items() if name in names]
    if not any(variant.is_llmq for variant in chosen):
        ours = ", ".join(name for name, variant in VARIANTS.items() if variant.is_llmq)
        raise UsageError(
            f"none of {', '.join(names) or 'no engines'} is llmq's, so there is nothing to compare with; add one of {ours}."
        )
    return chosen
