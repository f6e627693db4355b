"""The formats that are checked, and those that are timed, by the name of a scheme where there is one."""

from __future__ import annotations

from llmq.numerics.grid import ActivationGrid, Float8Activation, Float8Grid, FloatGrid, IntGrid, LinearFormat, ZeroPointDomain


def int4(group_size: int | None, zero_point: ZeroPointDomain = "float", bits: int = 4) -> LinearFormat:
    """Return weights of 4 bits (or fewer) in groups, with bf16 scales."""
    return LinearFormat(IntGrid(bits, group_size, symmetric=zero_point == "none", zero_point=zero_point, scale_dtype="bfloat16"))


VERIFIED: dict[str, LinearFormat] = {
    "bf16": LinearFormat(FloatGrid("bfloat16")),
    "int8-weight-only": LinearFormat(IntGrid(8, scale_dtype="bfloat16")),
    **{f"int4 g={size}": int4(size) for size in (32, 64, 128, 256)},
    "int4 g=128, symmetric": int4(128, "none"),
    "int4 g=32, integer zero": int4(32, "int"),
    "int4 per channel": int4(None),
    "int3 g=64": int4(64, bits=3),
    "int8-dynamic": LinearFormat(IntGrid(8), ActivationGrid()),
    "int8 static": LinearFormat(IntGrid(8), ActivationGrid(static=True)),
    "int8-dynamic-int4": LinearFormat(IntGrid(4, 32, scale_dtype="bfloat16"), ActivationGrid(symmetric=False)),
    "float8-weight-only": LinearFormat(Float8Grid("bfloat16")),
    "float8-dynamic": LinearFormat(Float8Grid(), Float8Activation()),
    "float8-dynamic, tensor": LinearFormat(Float8Grid(), Float8Activation("tensor")),
}
TIMED: dict[str, LinearFormat] = {
    "bf16": VERIFIED["bf16"],
    "int8-weight-only": VERIFIED["int8-weight-only"],
    "int4 g=128": VERIFIED["int4 g=128"],
    "int8-dynamic": VERIFIED["int8-dynamic"],
    "float8-weight-only": VERIFIED["float8-weight-only"],
    "float8-dynamic": VERIFIED["float8-dynamic"],
}
