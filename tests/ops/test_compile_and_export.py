"""torch.compile without graph breaks, torch.export, and the operators' own contract (schema, fake, aliasing)."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from op_cases import FORMATS, make_weight, make_x, quantized_linear
from torch import Tensor, nn

from llmq.ops.aten import AtenInt4PackCpu, AtenInt8Pack
from llmq.ops.select import prepare, record_usage

BF16 = torch.bfloat16
NAMES = ["int8-weight-only", "int4", "int8-dynamic", "int8-static", "int8-dynamic-int4", "int3", "int5", "bf16"]
UNLIKE = ["int4", "int8-static", "int8-dynamic-int4", "bf16"]
"""Formats that share no code before they are prepared. These are compiled and exported both ways, the others one way each."""
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:FutureWarning",  # torch's own, about its pytrees, while it exports
    "ignore:.*treespec.*:UserWarning",
)


class Pair(nn.Module):
    """Two linears with something between them for a compiler to fuse."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.up = quantized_linear(name, 48, 128, BF16, bias=True)
        self.down = quantized_linear(name, 64, 192, BF16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        return self.down(torch.cat([hidden, hidden, hidden, hidden], dim=-1)) * 0.5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(name: str, *, prepared: bool) -> Pair:
    module = Pair(name)
    if prepared:
        prepare(module)
    return module


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of a bf16 intermediate: a few units in the last place of the largest output."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got.float() - expected.float()).abs().max() <= 2**-6 * expected.float().abs().max() + 1e-6


def check_compiled(
    name: str, *, prepared: bool, backend: str, dynamic: bool | None = None, rows: tuple[int, ...] = (3, 70)
) -> None:
    module = pair(name, prepared=prepared)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for count in rows:
            x = make_x(count, 128, BF16)
            close(compiled(x), module(x))


def test_compiles_without_a_graph_break():
    check_compiled("int4", prepared=True, backend="aot_eager")


@pytest.mark.slow
def test_compiles_for_every_rank_of_the_input():
    module = pair("int4", prepared=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((2, 5, 128), (1, 1, 128), (128,)):
            x = make_x(10, 128, BF16).flatten()[: torch.Size(shape).numel()].reshape(shape)
            close(compiled(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prepared"), [*((name, True) for name in NAMES), *((name, False) for name in UNLIKE)])
def test_every_format_compiles_without_a_graph_break(name, prepared):
    check_compiled(name, prepared=prepared, backend="aot_eager", rows=(1, 3, 70))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-weight-only", "int4", "int8-dynamic", "bf16"])
def test_compiles_with_inductor(name):
    check_compiled(name, prepared=True, backend="inductor", rows=(3,))


@pytest.mark.slow
def test_compiles_the_reference_with_inductor():
    check_compiled("int4", prepared=False, backend="inductor", rows=(3,))


@pytest.mark.slow
def test_compiles_with_a_dynamic_number_of_rows():
    check_compiled("int8-weight-only", prepared=True, backend="inductor", dynamic=True)


def test_compiled_calls_take_the_kernel_for_their_rows():
    module = pair("int8-weight-only", prepared=True)
    seen: list[str] = []

    def spy(graph, inputs):
        seen.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=spy))
    with torch.no_grad(), record_usage() as usage:
        compiled(make_x(2, 128, BF16))
    assert usage.calls == {}  # a graph does not come back to Python; see the plan instead
    kernel = module.up.weight.pick(2).name
    operators = {"aten-int8pack": "int8pack_linear", "native-int8": "native_linear"}
    for name, operator in operators.items():
        assert (operator in seen[0]) == (kernel == name)
    assert "llmq.linear" not in seen[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prepared"), [*((name, False) for name in NAMES), *((name, True) for name in UNLIKE)])
def test_exports_for_any_number_of_rows(name, prepared):
    module = pair(name, prepared=prepared)
    x = make_x(3, 128, BF16)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    plain = program.run_decompositions()
    assert "llmq.linear" not in plain.graph_module.code  # only kernels are left
    for rows in (2, 3, 80):
        x = make_x(rows, 128, BF16)
        close(plain.module()(x), module(x))


@pytest.mark.slow
def test_an_exported_program_survives_its_file():
    module = pair("int4", prepared=False)
    x = make_x(3, 128, BF16)
    program = torch.export.export(module, (x,)).run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    close(torch.export.load(file).module()(x), module(x))


@pytest.mark.parametrize(
    ("name", "kernel"), [("int8-weight-only", AtenInt8Pack()), ("int4", AtenInt4PackCpu()), ("int8-dynamic", None)]
)
def test_a_misaligned_input_is_safe_in_a_compiled_graph(name, kernel):
    """The address is known at run time only: the guard has to be inside the operator."""
    module = quantized_linear(name, 48, 128, BF16)
    if kernel is not None and not kernel.supports(module.weight.spec.case).ok:
        pytest.skip(kernel.supports(module.weight.spec.case).reason)
    prepare(module, prefer=None if kernel is None else kernel.name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = make_x(5, 128, BF16)
    shifted = torch.empty(5 * 128 + 3, dtype=BF16)[3:].view(5, 128).copy_(x)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
        assert torch.equal(compiled(shifted), module(x))


@pytest.mark.slow
def test_copies_compile_too():
    module = quantized_linear("int4", 48, 128, BF16)
    x = make_x(3, 128, BF16)

    def products(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T + torch.mm(x, weight.t())

    compiled = torch.compile(products, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, module.weight), 2 * module(x))
        other = copy.deepcopy(module)
        assert torch.equal(compiled(x, other.weight), 2 * module(x))


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.filterwarnings("ignore")
def test_operators_keep_torchs_contract(m):
    x = make_x(m, 64, BF16)
    eight = AtenInt8Pack().prepack(make_weight(FORMATS["int8-weight-only"], 32, 64))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.llmq.int8pack_linear.default, (x, eight[0], eight[1].reshape(-1)), test_utils=tests)
    four = AtenInt4PackCpu().prepack(make_weight(FORMATS["int4"], 32, 64))
    torch.library.opcheck(torch.ops.llmq.int4pack_linear.default, (x, *four, 32), test_utils=tests)
