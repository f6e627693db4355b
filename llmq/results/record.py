"""ResultRecord: one measured thing, with everything needed to know what it means and to measure it again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Schema versions that are read. Version 1 had no `Subject.kv_cache`."""

Kind = Literal["quantize", "perplexity", "divergence", "tasks", "decode", "prefill", "bandwidth", "kernel"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(_Strict):
    """One number: its value, its unit, and how sure it is."""

    value: float
    unit: str = Field(description="for example 'nats/token', 'tokens/s', 's', 'GB/s', 'bytes', 'bits', '1'")
    stderr: float | None = Field(default=None, description="standard error of `value`, same unit; None where none is defined")
    samples: list[float] | None = Field(default=None, description="raw repeats that `value` is the median of, same unit")


class Cache(_Strict):
    """The KV cache that a model was measured with: its grid is part of what the figures belong to."""

    dtype: str = Field(description="fp32, bf16, fp16 or int8")
    bytes_per_token: int = Field(description="keys and values of one token of one sequence in all layers, scales included")
    context_tokens: int = Field(description="the model's context: most tokens that one sequence can put into it")

    @property
    def bytes_at_context(self) -> int:
        """Bytes of a sequence that fills the model's context."""
        return self.bytes_per_token * self.context_tokens


class Subject(_Strict):
    """What was measured."""

    model: str = Field(description="name of the checkpoint's folder or file, without its path")
    checkpoint_sha256: str
    tokenizer_sha256: str | None = None
    scheme: str
    options: dict[str, Any] = Field(default_factory=dict, description="every option of the scheme, resolved")
    bits_per_weight: float | None = Field(default=None, description="all stored bits of the quantized linears / their elements")
    file_bits_per_weight: float | None = Field(default=None, description="the same over all parameters, embeddings included")
    size_bytes: int | None = Field(default=None, description="all stored parameters")
    kv_cache: Cache | None = Field(
        default=None, description="None: none has a part in it (a quantization, a kernel), or the record is of schema version 1"
    )


class Protocol(_Strict):
    """How it was measured. Results of different protocols are never compared."""

    name: str
    version: int
    params: dict[str, Any] = Field(default_factory=dict)


class Environment(_Strict):
    """Where it was measured."""

    llmq: str
    python: str
    packages: dict[str, str]
    platform: str
    cpu: str
    cpu_features: list[str]
    cores: int
    threads: int
    device: str
    memory_bytes: int


class ResultRecord(_Strict):
    """One measured thing."""

    schema_version: int = SCHEMA_VERSION
    id: str = Field(default_factory=lambda: uuid4().hex)
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    kind: Kind
    subject: Subject
    protocol: Protocol
    metrics: dict[str, Metric]
    kernels: dict[str, int] = Field(default_factory=dict, description="kernel that ran -> number of linears it ran for")
    environment: Environment
    notes: list[str] = Field(default_factory=list, description="what was skipped, what fell back, what overlaps")
