"""The registry: what is found, what is refused, and how."""

import json

import pytest
import torch

from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.statistics import Statistics
from llmq.errors import SchemeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import Float8Activation, Float8Grid, FloatGrid, IntGrid, format_from_json
from llmq.schemes.registry import describe_schemes, get_scheme, resolve, scheme_names

NAMES = [
    "bf16",
    "fp16",
    "fp32",
    "float8-dynamic",
    "float8-weight-only",
    "int2",
    "int2-autoround",
    "int2-awq",
    "int2-best",
    "int2-gptq",
    "int2-yaqa",
    "int3",
    "int3-autoround",
    "int3-awq",
    "int3-best",
    "int3-gptq",
    "int3-yaqa",
    "int4",
    "int4-autoround",
    "int4-awq",
    "int4-best",
    "int4-gptq",
    "int4-yaqa",
    "int8-dynamic",
    "int8-dynamic-int4",
    "int8-smoothquant",
    "int8-weight-only",
]


def test_every_scheme_is_found() -> None:
    assert scheme_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_contract_of_every_scheme(name: str) -> None:
    resolved = resolve(name)
    assert resolved.name == name
    assert get_scheme(name).summary
    assert format_from_json(json.loads(json.dumps(resolved.format.to_json()))) == resolved.format
    assert resolve(name, resolved.options_json()) == resolved
    weight = torch.randn(16, 256)
    known = Statistics(torch.eye(256), torch.zeros(256, 256), torch.eye(256), torch.eye(16))
    statistics = known if resolved.needs_calibration else None
    quantized, report = resolved.quantize_weight(weight, statistics, "some.linear")
    assert quantized.grid == resolved.format.weight
    assert quantized.bits_per_weight == resolved.format.weight.bits_per_weight(256)
    assert (report.fqn, report.shape) == ("some.linear", (16, 256))
    assert (report.loss is not None) == resolved.needs_calibration
    if isinstance(quantized.grid, IntGrid):
        assert report.sqnr_db is not None
        assert report.sqnr_db > {2: 8, 3: 13}.get(quantized.grid.bits, 15)
    elif isinstance(quantized.grid, Float8Grid):
        assert report.sqnr_db is not None
        assert report.sqnr_db > 30  # three bits of mantissa
    else:
        assert torch.equal(quantized.dequantize(), weight.to(getattr(torch, quantized.grid.dtype)).float())
    assert (resolved.baseline_dtype is not None) == isinstance(quantized.grid, FloatGrid)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_described_and_parses_from_text(name: str) -> None:
    (described,) = describe_schemes(name)
    json.dumps(described)
    defaults = resolve(name).options.model_dump()
    assert {option["name"]: option["default"] for option in described["options"]} == defaults
    for option in described["options"]:
        assert option["description"]
        if option["name"] in resolve(name).options_json():
            text = str(option["default"]).lower()
            assert resolve(name, {option["name"]: text}).options.model_dump() == defaults


def test_units() -> None:
    units = {option["name"]: option["unit"] for option in describe_schemes("int4-gptq")[0]["options"]}
    assert units["group_size"] == "inputs"
    assert units["block_size"] == "columns"
    assert units["damping"] == "fraction of the mean diagonal"


def test_options_reach_the_grid() -> None:
    grid = resolve("int4", {"group_size": "32", "zero_point": "int"}).format.weight
    assert grid == IntGrid(4, 32, symmetric=False, zero_point="int", scale_dtype="bfloat16")
    symmetric = resolve("int4", {"symmetric": "true", "mapping": "symmetric_no_clipping_err", "search": "range"})
    assert symmetric.format.weight == IntGrid(4, 128, symmetric=True, zero_point="none", scale_dtype="bfloat16")
    assert "zero_point" not in symmetric.options_json()
    weight = torch.randn(4, 128)
    expected = quantize_rtn(weight, symmetric.format.weight, mapping=MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    assert torch.equal(symmetric.quantize_weight(weight, None, "x")[0].qdata, expected.qdata)
    assert resolve("int8-dynamic").format.weight.scale_dtype == "float32"
    assert resolve("float8-dynamic", {"granularity": "tensor"}).format.activation == Float8Activation("tensor")
    activation = resolve("int8-dynamic-int4").format.activation
    assert activation is not None
    assert not activation.symmetric


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int5", {}, "unknown scheme 'int5'. Did you mean 'int4'?"),
        ("int4", {"groupsize": "64"}, "scheme int4 has no option 'groupsize'. Did you mean 'group_size'?"),
        ("bf16", {"group_size": 64}, "scheme bf16 has no option 'group_size'. It has no options."),
        ("int4", {"group_size": "48"}, "option group_size of scheme int4 must be 32, 64, 128, 256 or 'channel', got 48."),
        ("int4", {"group_size": "many"}, "option group_size of scheme int4 must be 32, 64, 128, 256 or 'channel', got 'many'."),
        ("int4", {"symmetric": "perhaps"}, "option symmetric of scheme int4 must be a valid boolean"),
        ("int4", {"symmetric": "true", "zero_point": "int"}, "symmetric=true has no zero point"),
        ("int4", {"mapping": "symmetric"}, "mapping is for symmetric grids"),
        ("int4-gptq", {"damping": "-1"}, "option damping of scheme int4-gptq must be greater than or equal to 0, got '-1'."),
        ("int4-gptq", {"block_size": "0"}, "must be greater than or equal to 1"),
        ("float8-dynamic", {"granularity": "block"}, "must be 'row' or 'tensor', got 'block'."),
        ("int8-dynamic", {"mapping": "asymmetric"}, "must be 'symmetric' or 'symmetric_no_clipping_err', got 'asymmetric'."),
    ],
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(name, options)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_gptq_without_statistics_says_what_to_do() -> None:
    with pytest.raises(SchemeError, match="calibrate"):
        resolve("int4-gptq").quantize_weight(torch.randn(4, 128), None, "a.b")
