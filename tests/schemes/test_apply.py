"""quantize_ on modules of every kind: all or nothing, and everything accounted for."""

import copy

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms.statistics import Statistics
from llmq.errors import SchemeError, ShapeError, UsageError
from llmq.numerics.grid import FloatGrid
from llmq.ops.tensor import QuantizedTensor
from llmq.results.coverage import Coverage
from llmq.schemes.apply import plan, quantize_
from llmq.schemes.registry import resolve, scheme_names


class Mixed(nn.Module):
    """Linears, a tied head, a shared linear, an embedding, a norm, a convolution, a bare parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 128)
        self.up = nn.Linear(128, 256)
        self.norm = nn.LayerNorm(256)
        self.down = nn.Linear(256, 128, bias=False)
        self.again = self.down
        self.head = nn.Linear(128, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.gain = nn.Parameter(torch.ones(128))
        self.register_buffer("shift", torch.zeros(128))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = h + self.again(self.norm(self.up(h))) * self.gain + self.shift
        return self.head(h)


def statistics(module: nn.Module) -> dict[str, Statistics]:
    linears = {fqn: m for fqn, m in module.named_modules() if isinstance(m, nn.Linear)}
    return {fqn: known(m.in_features, m.out_features) for fqn, m in linears.items()}


def known(k: int, n: int) -> Statistics:
    return Statistics(torch.eye(k), torch.zeros(k, k), torch.eye(k), torch.eye(n))


def row(report: Coverage, fqn: str):
    (found,) = [row for row in report.rows if row.fqn == fqn]
    return found


@pytest.mark.parametrize("name", scheme_names())
def test_every_scheme_on_any_module(name: str) -> None:
    torch.manual_seed(0)
    module = Mixed()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        exact = module(tokens)
    resolved = resolve(name)
    dtype = resolved.baseline_dtype or torch.bfloat16
    with torch.device("meta"):
        planned_on = Mixed()
    planned = plan(planned_on, resolved, skip=["head"], dtype=dtype)
    report = quantize_(module, name, skip=["head"], dtype=dtype, statistics=statistics(module))
    with torch.no_grad():
        y = module(tokens)
    assert y.dtype == dtype
    assert ((y.float() - exact).norm() / exact.norm()).item() < next(
        (limit for bits, limit in (("int2", 1.0), ("int3", 0.45), ("int4", 0.2)) if bits in name), 0.03
    )
    assert type(module.up) is nn.Linear
    assert all(isinstance(m.weight, QuantizedTensor) for m in module.modules() if isinstance(m, nn.Linear))
    assert module.norm.weight.dtype == module.up.bias.dtype == module.gain.dtype == module.shift.dtype == dtype

    assert [r.fqn for r in report.rows] == ["gain", "embedding", "up", "norm", "down", "head"]
    assert [(r.fqn, r.nbytes, r.tied_to) for r in planned.rows] == [(r.fqn, r.nbytes, r.tied_to) for r in report.rows]
    assert row(report, "head").tied_to == "embedding"
    assert isinstance(module.head.weight, QuantizedTensor)
    assert isinstance(module.head.weight.format.weight, FloatGrid)
    assert module.head.weight.weight.qdata.data_ptr() == module.embedding.weight.data_ptr()
    for fqn in ("up", "down"):
        weight = module.get_submodule(fqn).weight
        assert weight.format == resolved.format
        assert row(report, fqn).nbytes == weight.nbytes_stored
        assert row(report, fqn).bits_per_weight == pytest.approx(resolved.format.weight.bits_per_weight(weight.shape[1]))
        assert row(report, fqn).source == "float32"
    reasons = report.skipped
    assert reasons["embedding"] == "not a linear (Embedding)"
    assert reasons["norm"] == "not a linear (LayerNorm)"
    assert ("head" in reasons) == (resolved.baseline_dtype is None)
    assert report.bits_per_weight == pytest.approx(8 * sum(row(report, fqn).nbytes for fqn in ("up", "down")) / (2 * 128 * 256))
    assert Coverage.from_json(report.to_json()) == report
    assert report.summary().startswith(f"{name}: ")


def test_compute_dtype_is_each_weights_own_unless_asked() -> None:
    module = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128))
    quantize_(module, "int4")
    assert module[0].weight.dtype == torch.float32
    assert module[0].bias.dtype == module[1].weight.dtype == torch.float32
    assert module(torch.randn(3, 128)).dtype == torch.float32


def test_a_filter_leaves_linears_untouched() -> None:
    module = Mixed()
    before = module.down.weight
    report = quantize_(module, "int8-weight-only", filter=lambda fqn, linear: linear.out_features == 256)
    assert module.down.weight is before
    assert isinstance(module.up.weight, QuantizedTensor)
    assert row(report, "down").reason == "refused by the filter"


def test_a_root_linear() -> None:
    linear = nn.Linear(128, 16)
    report = quantize_(linear, "int4", options={"group_size": 32})
    assert report.rows[0].target == "int4 g32 float zero"
    assert linear(torch.randn(2, 128)).shape == (2, 16)


def test_one_weight_in_two_linears_stays_one() -> None:
    module = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    module[1].weight = module[0].weight
    report = quantize_(module, "int4")
    assert module[1].weight is module[0].weight
    assert report.rows[1].tied_to == "0"
    assert report.nbytes == module[0].weight.nbytes_stored


def test_attention_keeps_the_projection_that_it_reads_itself() -> None:
    module = nn.MultiheadAttention(128, 4, batch_first=True)
    report = quantize_(module, "int8-weight-only")
    assert "read by the module around it" in row(report, "out_proj").reason
    x = torch.randn(1, 3, 128)
    with torch.no_grad():
        assert module(x, x, x)[0].shape == x.shape


def test_baselines_round_once_and_can_be_quantized_afterwards() -> None:
    module = nn.Sequential(nn.Linear(128, 32, bias=False))
    original = module[0].weight.detach().clone()
    quantize_(module, "bf16")
    assert torch.equal(module[0].weight.dequantize(), original.bfloat16().float())
    report = quantize_(module, "int4")
    assert report.rows[0].target == "int4 g128 float zero"
    assert report.rows[0].source == "bfloat16"


def test_all_misfits_are_named_at_once_and_nothing_has_changed() -> None:
    module = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(96, 8), "c": nn.Linear(100, 8)})
    before = dict(module.named_parameters())
    with pytest.raises(ShapeError) as caught:
        quantize_(module, "int4", dtype=torch.bfloat16)
    message = str(caught.value)
    assert "b [8, 96]" in message
    assert "c [8, 100]" in message
    assert "group sizes that fit: 32" in message
    assert "--skip" in message
    assert all(parameter is before[fqn] and parameter.dtype == torch.float32 for fqn, parameter in module.named_parameters())


def test_misfits_say_which_group_size_fits_all() -> None:
    module = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(96, 8)})
    with pytest.raises(ShapeError, match="use group_size 32, which fits every linear"):
        quantize_(module, "int4")


def test_misfits_can_be_skipped_on_request() -> None:
    module = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(96, 8)})
    report = quantize_(module, "int4", skip_unfit=True)
    assert row(report, "a").target == "int4 g128 float zero"
    assert row(report, "b").reason.startswith("does not fit: 96 inputs cannot be cut into groups of 128")
    assert isinstance(module["b"].weight.format.weight, FloatGrid)
    module = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(96, 8)})
    assert row(quantize_(module, "int4", skip=["b"]), "b").reason == "skipped as asked"


def test_refusals() -> None:
    module = Mixed()
    with pytest.raises(UsageError, match=r"'dwon' matches no linear.*Did you mean 'down'"):
        quantize_(module, "int4", skip=["dwon"])
    with pytest.raises(SchemeError, match=r"needs statistics of the inputs of up, down, head; quantize with calibration text"):
        quantize_(module, "int4-gptq")
    with pytest.raises(SchemeError, match="needs statistics of the inputs of up; quantize"):
        quantize_(module, "int4-gptq", statistics={"down": torch.eye(256), "head": torch.eye(128)})
    with pytest.raises(UsageError, match="options belong to a scheme that is given by name"):
        quantize_(module, resolve("int4"), options={"group_size": 32})
    with pytest.raises(UsageError, match="compute dtypes"):
        quantize_(module, "int4", dtype=torch.float64)
    with pytest.raises(SchemeError, match="meta device"):
        quantize_(copy.deepcopy(module).to("meta"), "int4")
    assert not any(isinstance(parameter, QuantizedTensor) for parameter in module.parameters())
    quantize_(module, "int4")
    with pytest.raises(SchemeError, match="up is quantized already"):
        quantize_(module, "int4")


def test_weights_in_odd_dtypes_are_reported() -> None:
    module = nn.Sequential(nn.Linear(128, 8).double())
    report = quantize_(module, "int4")
    assert "torch.float64 is no compute dtype" in report.rows[0].reason
    assert row(quantize_(module, "int4", dtype=torch.float32), "0").target == "int4 g128 float zero"
