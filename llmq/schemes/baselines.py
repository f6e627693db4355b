"""bf16, fp16, fp32: the model as it is, in one dtype. What the other schemes are compared with."""

from __future__ import annotations

from typing import ClassVar

import torch

from llmq.numerics.grid import FloatGrid, LinearFormat
from llmq.schemes.base import NoOptions, Scheme


class Bf16(Scheme[NoOptions]):
    """Everything in bfloat16."""

    name = "bf16"
    summary = "baseline: every weight in bfloat16"
    Options = NoOptions
    baseline_dtype: ClassVar[torch.dtype | None] = torch.bfloat16

    def format(self, options: NoOptions) -> LinearFormat:  # noqa: ARG002 - there are none
        """See `Scheme.format`."""
        return LinearFormat(FloatGrid("bfloat16"))


class Fp16(Scheme[NoOptions]):
    """Everything in float16."""

    name = "fp16"
    summary = "baseline: every weight in float16"
    Options = NoOptions
    baseline_dtype: ClassVar[torch.dtype | None] = torch.float16

    def format(self, options: NoOptions) -> LinearFormat:  # noqa: ARG002 - there are none
        """See `Scheme.format`."""
        return LinearFormat(FloatGrid("float16"))


class Fp32(Scheme[NoOptions]):
    """Everything in float32."""

    name = "fp32"
    summary = "baseline: every weight in float32"
    Options = NoOptions
    baseline_dtype: ClassVar[torch.dtype | None] = torch.float32

    def format(self, options: NoOptions) -> LinearFormat:  # noqa: ARG002 - there are none
        """See `Scheme.format`."""
        return LinearFormat(FloatGrid("float32"))


SCHEMES = (Bf16(), Fp16(), Fp32())
