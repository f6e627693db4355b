"""int8-dynamic (W8A8): int8 weights and activations, each token's activations quantized as they come; int8 x int8 -> int32."""

from __future__ import annotations

from llmq.numerics.affine import MappingType
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.schemes.base import MAPPING_FIELD, Mapping, Scheme, SchemeOptions, symmetric_mapping


class Int8DynamicOptions(SchemeOptions):
    """Options of `int8-dynamic`."""

    mapping: Mapping = MAPPING_FIELD


class Int8Dynamic(Scheme[Int8DynamicOptions]):
    """Symmetric int8 per output channel and per token. Scales are fp32: they multiply an exact integer sum."""

    name = "int8-dynamic"
    summary = "int8 weights per output channel, int8 activations per token, both symmetric (W8A8)"
    Options = Int8DynamicOptions

    def format(self, options: Int8DynamicOptions) -> LinearFormat:  # noqa: ARG002 - the options change no format
        """See `Scheme.format`."""
        weight = IntGrid(8, None, symmetric=True, zero_point="none", scale_dtype="float32")
        return LinearFormat(weight, ActivationGrid(symmetric=True))

    def mapping(self, options: Int8DynamicOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return symmetric_mapping(options.mapping)


SCHEMES = (Int8Dynamic(),)
