"""float8-weight-only (W8A16): float8 weights, one scale an output channel; the activations stay as they are."""

from __future__ import annotations

from llmq.numerics.grid import Float8Grid, LinearFormat
from llmq.schemes.base import NoOptions, Scheme


class Float8WeightOnly(Scheme[NoOptions]):
    """e4m3 per output channel, with bf16 scales as `int8-weight-only` has them."""

    name = "float8-weight-only"
    summary = "float8 (e4m3) weights per output channel, bf16 scales (W8A16)"
    Options = NoOptions

    def format(self, options: NoOptions) -> LinearFormat:  # noqa: ARG002 - there are none
        """See `Scheme.format`."""
        return LinearFormat(Float8Grid("bfloat16"))


SCHEMES = (Float8WeightOnly(),)
