"""int8-weight-only (W8A16): int8 weights, one scale an output channel; the activations stay as they are."""

from __future__ import annotations

from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.schemes.base import MAPPING_FIELD, Mapping, Scheme, SchemeOptions, symmetric_mapping


class Int8WeightOnlyOptions(SchemeOptions):
    """Options of `int8-weight-only`."""

    mapping: Mapping = MAPPING_FIELD


class Int8WeightOnly(Scheme[Int8WeightOnlyOptions]):
    """Symmetric int8 per output channel, with the bf16 scales that the fast kernels take."""

    name = "int8-weight-only"
    summary = "int8 weights, symmetric per output channel, bf16 scales (W8A16)"
    Options = Int8WeightOnlyOptions

    def format(self, options: Int8WeightOnlyOptions) -> LinearFormat:  # noqa: ARG002 - the options change no format
        """See `Scheme.format`."""
        return LinearFormat(IntGrid(8, None, symmetric=True, zero_point="none", scale_dtype="bfloat16"))

    def mapping(self, options: Int8WeightOnlyOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return symmetric_mapping(options.mapping)


SCHEMES = (Int8WeightOnly(),)
