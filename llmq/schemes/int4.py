"""int4 (W4A16): int4 weights in groups, rounded to nearest; the activations stay as they are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.schemes.base import MAPPING_FIELD, GroupSize, Mapping, Scheme, SchemeOptions, symmetric_mapping


class Int4Options(SchemeOptions):
    """Options of `int4`, and of every scheme on its grid."""

    group_size: GroupSize = Field(
        128, description="consecutive inputs of a row that share a scale", json_schema_extra={"unit": "inputs"}
    )
    symmetric: bool = Field(default=False, description="a grid around zero, without zero points")
    zero_point: Literal["float", "int"] = Field(
        "float", description="of an asymmetric grid: a number (tinygemm's bf16), or an integer code"
    )
    mapping: Mapping = MAPPING_FIELD

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        return {"zero_point"} if self.symmetric else {"mapping"}

    @model_validator(mode="after")
    def _agree(self) -> Int4Options:
        if self.symmetric and "zero_point" in self.model_fields_set:
            raise ValueError("symmetric=true has no zero point; leave zero_point out")
        if not self.symmetric and "mapping" in self.model_fields_set:
            raise ValueError("mapping is for symmetric grids; add symmetric=true, or leave mapping out")
        return self


def int4_format(options: Int4Options) -> LinearFormat:
    """Return the format that these options ask for."""
    zero_point = "none" if options.symmetric else options.zero_point
    grid = IntGrid(4, options.group_size, symmetric=options.symmetric, zero_point=zero_point, scale_dtype="bfloat16")
    return LinearFormat(grid)


def int4_mapping(options: Int4Options) -> MappingType:
    """Return how these options lay a range over the codes."""
    return symmetric_mapping(options.mapping) if options.symmetric else MappingType.ASYMMETRIC


class Int4(Scheme[Int4Options]):
    """int4 by group, asymmetric with a floating zero point as tinygemm has it, unless asked otherwise."""

    name = "int4"
    summary = "int4 weights by group, round to nearest (W4A16)"
    Options = Int4Options

    def format(self, options: Int4Options) -> LinearFormat:
        """See `Scheme.format`."""
        return int4_format(options)

    def mapping(self, options: Int4Options) -> MappingType:
        """See `Scheme.mapping`."""
        return int4_mapping(options)


SCHEMES = (Int4(),)
