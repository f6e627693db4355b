"""ResultRecord: one measured thing, with everything needed to know what it means and to measure it again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from llmq.results.tokens import TokenFigures

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
"""Schema versions that are read. Version 1 had no `Subject.kv_cache`, version 2 no `details` and no `tokens_sha256`."""

Kind = Literal["quantize", "perplexity", "divergence", "tasks", "decode", "prefill", "bandwidth", "kernel", "layers"]


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


class Histogram(_Strict):
    """Counts of values between logarithmic edges.

    A value lies in bin i when edges[i] <= value < edges[i + 1]; zeros have a count of their own, because they have no logarithm.
    """

    unit: str
    edges: list[float] = Field(description="ascending, one more than there are bins; empty where every value is zero")
    counts: list[int]
    zeros: int = Field(default=0, description="values that are 0")

    @model_validator(mode="after")
    def _agree(self) -> Histogram:
        bins = max(0, len(self.edges) - 1)
        if len(self.counts) != bins or any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"{len(self.edges)} edges, ascending, go with {bins} counts; there are {len(self.counts)}")
        return self

    @property
    def total(self) -> int:
        """How many values there are."""
        return sum(self.counts) + self.zeros


class Details(_Strict):
    """What stands behind a record's figures, small enough to be part of it."""

    layers: dict[str, dict[str, Metric]] = Field(
        default_factory=dict, description="figures of single linears by fully qualified name, such as 'sqnr' (dB) and 'loss'"
    )
    histograms: dict[str, Histogram] = Field(
        default_factory=dict, description="'kl': of all scored tokens (nats); 'step_s': of all timed decode steps (s)"
    )


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
    details: Details = Field(default_factory=Details)
    tokens_sha256: str | None = Field(
        default=None, description="of the figures of every scored token, which are stored beside the record; None: it has none"
    )
    tokens: Any = Field(  # TokenFigures | None; as a type it would bring numpy to those who only read records
        default=None, exclude=True, repr=False, description="those figures, from measuring them until they are stored"
    )

    @model_validator(mode="after")
    def _named(self) -> ResultRecord:
        if self.tokens is not None and self.tokens.sha256 != self.tokens_sha256:
            raise ValueError("tokens_sha256 is not that of the figures; make such records with `with_tokens`")
        return self

    def with_tokens(self, tokens: TokenFigures | None) -> ResultRecord:
        """Return this record with the figures of its scored tokens, or without them but still naming them."""
        sha256 = self.tokens_sha256 if tokens is None else tokens.sha256
        return self.model_copy(update={"tokens": tokens, "tokens_sha256": sha256})

    def without_tokens(self) -> ResultRecord:
        """Return this record without any figures of its scored tokens, for where their room counts more than later pairing."""
        return self.model_copy(update={"tokens": None, "tokens_sha256": None})
