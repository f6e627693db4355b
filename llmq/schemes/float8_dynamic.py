"""float8-dynamic (W8A8): float8 weights and activations, activations quantized as they come; float8 x float8 -> fp32."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmq.numerics.grid import Float8Activation, Float8Grid, LinearFormat
from llmq.schemes.base import Scheme, SchemeOptions


class Float8DynamicOptions(SchemeOptions):
    """Options of `float8-dynamic`."""

    granularity: Literal["row", "tensor"] = Field(
        "row",
        description="what shares a scale of the activations: 'row', each token its own, or 'tensor', all tokens of a call, where "
        "what a token gives depends on those beside it",
    )


class Float8Dynamic(Scheme[Float8DynamicOptions]):
    """e4m3 per output channel and per token. Scales are fp32: they multiply an fp32 sum."""

    name = "float8-dynamic"
    summary = "float8 (e4m3) weights per output channel, float8 activations per token (W8A8)"
    Options = Float8DynamicOptions

    def format(self, options: Float8DynamicOptions) -> LinearFormat:
        """See `Scheme.format`."""
        return LinearFormat(Float8Grid("float32"), Float8Activation(options.granularity))


SCHEMES = (Float8Dynamic(),)
