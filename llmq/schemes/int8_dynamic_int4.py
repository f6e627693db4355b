"""int8-dynamic-int4 (W4A8, torchao's 8da4w): int4 weights in groups, asymmetric int8 activations per token."""

from __future__ import annotations

from pydantic import Field

from llmq.numerics.affine import MappingType
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.schemes.base import MAPPING_FIELD, GroupSize, Mapping, Scheme, SchemeOptions, symmetric_mapping


class Int8DynamicInt4Options(SchemeOptions):
    """Options of `int8-dynamic-int4`."""

    group_size: GroupSize = Field(
        32, description="consecutive inputs of a row that share a scale", json_schema_extra={"unit": "inputs"}
    )
    mapping: Mapping = MAPPING_FIELD


class Int8DynamicInt4(Scheme[Int8DynamicInt4Options]):
    """Symmetric int4 by group with bf16 scales; int8 activations with a zero point per token."""

    name = "int8-dynamic-int4"
    summary = "int4 weights, symmetric by group, int8 activations per token (W4A8, 8da4w)"
    Options = Int8DynamicInt4Options

    def format(self, options: Int8DynamicInt4Options) -> LinearFormat:
        """See `Scheme.format`."""
        weight = IntGrid(4, options.group_size, symmetric=True, zero_point="none", scale_dtype="bfloat16")
        return LinearFormat(weight, ActivationGrid(symmetric=False))

    def mapping(self, options: Int8DynamicInt4Options) -> MappingType:
        """See `Scheme.mapping`."""
        return symmetric_mapping(options.mapping)


SCHEMES = (Int8DynamicInt4(),)
