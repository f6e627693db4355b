"""QuantizedTensor as a torch.Tensor: nn.Linear, matmul, copies, devices, files; and that nothing is dequantized unasked."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from op_cases import FORMATS, make_weight, make_x, quantized_linear
from torch import nn
from torch.nn import functional as F

from llmq.errors import ShapeError, UsageError
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.select import prepare, unprepare
from llmq.ops.tensor import QuantizedTensor

BF16 = torch.bfloat16
NAMES = ["int8-weight-only", "int4", "int8-dynamic", "int4-static", "int8-dynamic-int4", "bf16"]


@pytest.fixture(params=[False, True], ids=["canonical", "prepared"])
def prepared(request):
    return request.param


@pytest.fixture
def linear(request, prepared):
    module = quantized_linear(getattr(request, "param", "int4"), 48, 128, BF16, bias=True)
    if prepared:
        prepare(module)
    return module


def same(one: QuantizedWeight, two: QuantizedWeight) -> bool:
    return one.grid == two.grid and all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))


@pytest.mark.parametrize("linear", NAMES, indirect=True)
def test_ranks_of_the_input(linear):
    x = make_x(12, 128, BF16)
    y = linear(x)
    assert torch.equal(linear(x.reshape(3, 4, 128)), y.reshape(3, 4, 48))
    assert torch.equal(linear(x.reshape(2, 3, 1, 2, 128)), y.reshape(2, 3, 1, 2, 48))
    assert linear(x[0]).shape == (48,)
    torch.testing.assert_close(linear(x[0]), y[0], rtol=0.02, atol=0.02)
    assert linear(x[:0]).shape == (0, 48)
    assert linear(torch.empty(2, 0, 128, dtype=BF16)).shape == (2, 0, 48)


def test_every_spelling_of_the_product_is_the_same(linear):
    x, w = make_x(5, 128, BF16), linear.weight
    y = F.linear(x, w)
    with torch.no_grad():
        spellings = [x @ w.T, x @ w.t(), x @ w.mT, x.matmul(w.T), torch.mm(x, w.t()), torch.matmul(x, w.transpose(0, 1))]
        spellings += [torch.ops.aten.linear(x, w), torch.ops.aten.mm(x, w.t()), F.linear(x, weight=w, bias=None)]
    assert all(torch.equal(y, spelling) for spelling in spellings)
    assert torch.equal(torch.addmm(linear.bias, x, w.t()), linear(x))
    assert torch.equal((x.reshape(1, 5, 128) @ w.T)[0], y)
    with torch.inference_mode():
        assert torch.equal(linear(x), F.linear(x, w, linear.bias))
    assert w.T.shape == (128, 48)
    assert torch.equal(w.T.dequantize(), w.dequantize().T)


def test_looks_like_the_weight_it_replaces(linear):
    w = linear.weight
    assert isinstance(w, nn.Parameter)
    assert isinstance(w, QuantizedTensor)
    assert (w.shape, w.dtype, w.device.type, w.requires_grad) == ((48, 128), BF16, "cpu", False)
    assert w.nbytes_stored == 48 * 128 // 2 + 48 * 4 * 2 * 2
    assert "IntGrid(bits=4" in repr(w)
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert linear.weight.numel() == 48 * 128


@pytest.mark.parametrize("linear", NAMES, indirect=True)
def test_copies_are_equal_and_independent(linear):
    x, before = make_x(3, 128, BF16), linear.weight.weight
    for other in (copy.deepcopy(linear), copy.deepcopy(nn.ModuleDict({"a": linear, "b": linear}))["b"]):
        assert isinstance(other.weight, nn.Parameter)
        assert other.weight.spec == linear.weight.spec
        assert torch.equal(other(x), linear(x))
        for tensor in other.weight.stored:
            tensor.zero_()
    assert same(linear.weight.weight, before)
    tied = copy.deepcopy(nn.ModuleDict({"a": linear, "b": linear}))
    assert tied["a"].weight is tied["b"].weight
    clone = linear.weight.clone()
    assert clone.stored[0].data_ptr() != linear.weight.stored[0].data_ptr()
    assert linear.weight.detach().stored[0].data_ptr() == linear.weight.stored[0].data_ptr()


@pytest.mark.parametrize("linear", NAMES, indirect=True)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_through_a_file(linear, assign):
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["weight"].kernel_layout == "canonical"  # whatever it was in memory
    name = next(name for name, format_ in FORMATS.items() if format_ == linear.weight.format)
    other = quantized_linear(name, 48, 128, BF16, bias=True)
    for tensor in other.weight.stored:
        tensor.zero_()
    other.load_state_dict(state, assign=assign)
    assert isinstance(other.weight, nn.Parameter)
    assert same(other.weight.weight, linear.weight.weight)
    unprepare(linear)
    x = make_x(4, 128, BF16)
    assert torch.equal(other(x), linear(x))


def test_loading_into_a_prepared_module_keeps_its_kernels():
    source, target = (quantized_linear("int4", 48, 128, BF16) for _ in range(2))
    prepare(target)
    spec = target.weight.spec
    for tensor in target.weight.stored:
        tensor.zero_()
    target.load_state_dict(source.state_dict())
    assert target.weight.spec == spec
    assert same(target.weight.weight, source.weight.weight)


def test_a_whole_module_through_a_file(linear):
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert isinstance(other.weight, nn.Parameter)
    assert same(other.weight.weight, linear.weight.weight)


def test_dtype_and_device_move_and_the_numbers_stay():
    linear = quantized_linear("int4", 48, 128, BF16, bias=True)
    before = linear.weight.weight
    linear.to(torch.float32)
    assert isinstance(linear.weight, nn.Parameter)
    assert linear.weight.dtype == torch.float32
    assert linear.bias.dtype == torch.float32
    assert same(linear.weight.weight, before)
    assert linear(make_x(2, 128, torch.float32)).dtype == torch.float32
    linear.half()
    assert linear(make_x(2, 128, torch.float16)).dtype == torch.float16
    linear.to("meta")
    assert linear.weight.device.type == "meta"
    assert linear.weight.spec.case.device == "meta"


def test_a_prepared_weight_says_that_it_cannot_be_moved():
    linear = quantized_linear("int4", 48, 128, BF16)
    prepare(linear)
    linear.to(BF16)  # no change
    with pytest.raises(
        UsageError, match=r"prepared for torch.bfloat16 on cpu .* unprepare\(\) before moving it to torch.float32"
    ):
        linear.to(torch.float32)
    unprepare(linear)
    assert linear.to(torch.float32).weight.dtype == torch.float32


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w + 1,
        lambda w: w * w,
        lambda w: w.sum(),
        lambda w: w[0],
        lambda w: w.reshape(-1),
        lambda w: w.abs(),
        lambda w: torch.cat([w, w]),
        lambda w: F.embedding(torch.tensor([1]), w),
        lambda w: w.float() + w.to(BF16),
    ],
)
def test_nothing_is_dequantized_unasked(operation, linear):
    unprepare(linear)
    with pytest.raises(UsageError, match=r"take \.dequantize\(\) for a plain tensor"):
        operation(linear.weight)


def test_misuse_is_named():
    w = quantized_linear("int4", 48, 128, BF16).weight
    x = make_x(2, 128, BF16)
    with pytest.raises(UsageError, match=r"the input is torch.float32 and the weight computes in torch.bfloat16"):
        F.linear(x.float(), w)
    with pytest.raises(ShapeError, match=r"takes inputs \[..., 128\], got \[2, 64\]"):
        F.linear(x[:, :64], w)
    with pytest.raises(UsageError, match="has no gradient"):
        F.linear(x.requires_grad_(), w)
    x = x.detach()
    with pytest.raises(UsageError, match="second operand"):
        F.linear(w, x)
    with pytest.raises(UsageError, match="transposed"):
        F.linear(x, w.T)
    with pytest.raises(UsageError, match="second operand of a matrix product, transposed"):
        _ = w @ x.T
    with pytest.raises(UsageError, match="beta = alpha = 1"):
        torch.addmm(torch.zeros(48, dtype=BF16), x, w.T, beta=0.5)
    with pytest.raises(UsageError, match="filled from a plain tensor"):
        w.copy_(torch.zeros(48, 128))
    with pytest.raises(UsageError, match="cannot fill one of"):
        w.copy_(quantized_linear("int8-dynamic", 48, 128, BF16).weight)
    with pytest.raises(UsageError, match="the weight is on IntGrid"):
        QuantizedTensor.from_weight(make_weight(FORMATS["int4"], 48, 128), FORMATS["int3"])
    static, dynamic = make_weight(FORMATS["int8-static"], 4, 8), make_weight(FORMATS["int8-dynamic"], 4, 8)
    with pytest.raises(UsageError, match="need the input_scale of their linear, got none"):
        QuantizedTensor.from_weight(dynamic, FORMATS["int8-static"])
    with pytest.raises(UsageError, match="only static activations have an input_scale"):
        QuantizedTensor.from_weight(static, FORMATS["int8-dynamic"])
    for number in (0.0, -1.0, 1e-40, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="a normal positive fp32 number, got"):
            QuantizedTensor.from_weight(replace(static, input_scale=torch.tensor([number])), FORMATS["int8-static"])


def test_works_on_any_module_that_calls_a_linear():
    """A transformer of torch's own, none of llmq's."""
    block = (
        nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dtype=torch.float32).eval().requires_grad_(requires_grad=False)
    )
    x = torch.randn(2, 5, 32)
    for name in ("linear1", "linear2"):
        linear = getattr(block, name)
        weight = QuantizedWeight.from_float(linear.weight.detach())
        tensor = QuantizedTensor.from_weight(weight, FORMATS["fp32"], torch.float32)
        linear.weight = nn.Parameter(tensor, requires_grad=False)
    plain = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dtype=torch.float32).eval()
    plain.load_state_dict(
        {**block.state_dict(), **{f"{n}.weight": getattr(block, n).weight.dequantize() for n in ("linear1", "linear2")}}
    )
    block.train()  # the fused inference path asks for plain parameters
    plain.train()
    torch.nn.init.zeros_(block.self_attn.in_proj_bias)
    plain.self_attn.in_proj_bias.data.zero_()
    for module in (*block.modules(), *plain.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    block.self_attn.dropout = plain.self_attn.dropout = 0.0
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-5)
