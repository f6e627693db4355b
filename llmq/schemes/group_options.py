"""Options that every scheme on integer groups shares: the grid, and which steps of rounding are taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmq.algorithms.rounding import RoundingOptions
from llmq.algorithms.statistics import Needs
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.schemes.base import MAPPING_FIELD, Mapping, SchemeOptions, number, symmetric_mapping

_DEFAULTS = RoundingOptions()

GroupSizeOrChannel = Annotated[Literal[32, 64, 128, 256, "channel"], BeforeValidator(number)]
"""Inputs of a group; 'channel' is one group a row."""


class GroupOptions(SchemeOptions):
    """The grid of a weight whose bits the scheme says, and where its scales come from."""

    group_size: GroupSizeOrChannel = Field(
        128,
        description="consecutive inputs of a row that share a scale; 'channel': all of them",
        json_schema_extra={"unit": "inputs"},
    )
    symmetric: bool = Field(default=False, description="a grid around zero, without zero points")
    zero_point: Literal["float", "int"] = Field(
        "float", description="of an asymmetric grid: a number (tinygemm's bf16), or an integer code"
    )
    mapping: Mapping = MAPPING_FIELD
    search: Literal["range", "error", "weighted"] = Field(
        "error",
        description="scales and zero points: 'range' takes a group's range (round to nearest), 'error' searches for the least "
        "error of the weight, 'weighted' weighs it by the inputs' second moments where they are known",
    )

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        return {"zero_point"} if self.symmetric else {"mapping"}

    @model_validator(mode="after")
    def _agree(self) -> GroupOptions:
        if self.symmetric and "zero_point" in self.model_fields_set:
            raise ValueError("symmetric=true has no zero point; leave zero_point out")
        if not self.symmetric and "mapping" in self.model_fields_set:
            raise ValueError("mapping is for symmetric grids; add symmetric=true, or leave mapping out")
        return self

    def grid(self, bits: int) -> IntGrid:
        """Return the grid of these options with codes of `bits` bits."""
        size = None if self.group_size == "channel" else self.group_size
        zero_point = "none" if self.symmetric else self.zero_point
        return IntGrid(bits, size, symmetric=self.symmetric, zero_point=zero_point, scale_dtype="bfloat16")

    def format(self, bits: int) -> LinearFormat:
        """Return what a linear becomes: such a weight, and inputs that stay as they are."""
        return LinearFormat(self.grid(bits))

    def range_mapping(self) -> MappingType:
        """Return how a group's range is laid over the codes."""
        return symmetric_mapping(self.mapping) if self.symmetric else MappingType.ASYMMETRIC


class CalibratedOptions(GroupOptions):
    """Which steps of `algorithms.rounding` are taken, each of which can be left out."""

    search: Literal["range", "error", "weighted"] = Field(
        _DEFAULTS.search,
        description="scales and zero points before rounding: from a group's 'range', from the 'error' of the weight, or from "
        "that error 'weighted' by the inputs' second moments",
    )
    metric: Literal["inputs", "outputs", "fisher"] = Field(
        _DEFAULTS.metric,
        description="the error that is made small: of each linear's outputs ('inputs'), the same with outputs weighted and "
        "coupled by the whole model's Fisher information ('outputs'), or the Fisher information on both sides ('fisher', YAQA)",
    )
    correction: float = Field(
        _DEFAULTS.correction,
        ge=0,
        le=1,
        description="how much of the error that reaches a linear from quantized blocks before it is corrected, where the walk "
        "knows the original model's inputs",
        json_schema_extra={"unit": "fraction"},
    )
    refit: bool = Field(_DEFAULTS.refit, description="re-fit scales and zero points to the codes in closed form")
    sweeps: int = Field(
        _DEFAULTS.sweeps,
        ge=0,
        le=100,
        description="times that coordinate descent goes over all codes",
        json_schema_extra={"unit": "sweeps"},
    )
    damping: float = Field(
        _DEFAULTS.damping,
        ge=0,
        le=1,
        description="added to the Hessian's diagonal; ten times more where it cannot be factorised",
        json_schema_extra={"unit": "fraction of the mean diagonal"},
    )
    act_order: bool = Field(_DEFAULTS.act_order, description="round the columns by falling activation energy")
    block_size: int = Field(
        _DEFAULTS.block_size,
        ge=1,
        description="columns between two large matrix products; changes the speed, not the codes",
        json_schema_extra={"unit": "columns"},
    )

    def rounding(self) -> RoundingOptions:
        """Return them as `algorithms.rounding` takes them."""
        return RoundingOptions(
            search=self.search,
            correction=self.correction,
            refit=self.refit,
            sweeps=self.sweeps,
            metric=self.metric,
            damping=self.damping,
            act_order=self.act_order,
            block_size=self.block_size,
            mapping=self.range_mapping(),
        )

    def rounding_needs(self) -> Needs:
        """Return the statistics that rounding takes under these options."""
        needs = Needs.INPUTS
        if self.correction > 0:
            needs |= Needs.UPSTREAM
        if self.metric != "inputs":
            needs |= Needs.FISHER
        return needs
