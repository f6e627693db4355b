"""Scales of input channels, folded into what produces them: the block computes the same function, its linears have other weights.

A linear's input x [K] may be divided by any s > 0 [K] when the columns of its weight are multiplied by it, and the division
costs nothing where the producer of x can absorb it. In a block of the Llama family there are four such places:

    input_layernorm           -> q_proj, k_proj, v_proj      the norm's weight
    self_attn.v_proj          -> o_proj                      rows of v; attention mixes positions, never channels
    post_attention_layernorm  -> gate_proj, up_proj          the norm's weight
    mlp.up_proj               -> down_proj                   rows of up; they are multiplied by silu(gate), element by element

With grouped queries a channel of v reaches one channel of o for every head that reads it, and all of them share its scale.

A norm's weight, and a bias, are stored in 16 bits, so w / s would be rounded, and the function would change. Instead s is
chosen so that it is not: with w' = w / s rounded to bfloat16, the scale that is folded is the exact quotient w / w', and the
weights of the linears, which are about to be quantized anyway, take the difference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.errors import SchemeError, ShapeError

STORED_DTYPE = torch.bfloat16
"""Folded norms and biases are numbers of this dtype; fp32 holds them too."""

FOLD_TURNS = 20
"""Turns of the fit in `folded_scales`; each shrinks what gaps leave by the share of entries that are zero."""

_NORM_PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
_LINEAR_PAIRS = (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"))
_HEAD = (("model.norm", "norm"), "lm_head")


@dataclass(frozen=True, slots=True)
class FoldPair:
    """A producer of channels and the linears that read them.

    Attributes:
        producer: name of a norm or a linear inside the block.
        consumers: names of the linears that read its output (for `v_proj`: the attention's), in the order of their calls.
        channels: number of scales C: the producer's outputs.
        head_dim: outputs of the producer that are repeated together; None: nothing is repeated, and K = C.
        repeats: how often each head of the producer appears, one copy after the other, among the consumers' K inputs.
        norm: the producer is a norm, whose weight stays a vector of 16-bit numbers whatever happens to the linears.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: int
    head_dim: int | None = None
    repeats: int = 1
    norm: bool = False

    def expand(self, scale: Tensor) -> Tensor:
        """Return what each of the consumers' K inputs has, for values [C] of the producer's outputs."""
        if self.head_dim is None:
            return scale
        return scale.reshape(-1, self.head_dim).repeat_interleave(self.repeats, dim=0).reshape(-1)

    def gather(self, values: Tensor) -> Tensor:
        """Return [repeats, C]: the values [K] of the consumers' inputs, for every output of the producer that feeds them."""
        if self.head_dim is None:
            return values.reshape(1, -1)
        heads = values.reshape(-1, self.repeats, self.head_dim)
        return heads.transpose(0, 1).reshape(self.repeats, -1)


def fold_pairs(block: nn.Module, linears: Collection[str] | None = None) -> list[FoldPair]:
    """Find the four pairs of a block, or the pair of the head.

    Args:
        block: a decoder block with Hugging Face's names, or the model when its head is worked on.
        linears: names of those whose weight is about to be quantized; a pair that would put a scale into any other linear
            (whose 16-bit weight would be rounded) is left out. None: all pairs.

    Returns:
        The pairs, in the order of their calls. `lm_head` has one only where `linears` names it.

    Raises:
        SchemeError: modules are missing, or shapes do not belong together.
    """
    modules = dict(block.named_modules())
    if linears is not None and _HEAD[1] in linears:
        producer = next((name for name in _HEAD[0] if name in modules), None)
        if producer is None:
            raise SchemeError(
                f"no norm before {_HEAD[1]} was found under {', '.join(_HEAD[0])}; quantize the head without folding."
            )
        return [_pair(modules, producer, (_HEAD[1],))]
    wanted = [name for pair in _NORM_PAIRS for name in (pair[0], *pair[1])] + [name for pair in _LINEAR_PAIRS for name in pair]
    missing = [name for name in dict.fromkeys(wanted) if name not in modules]
    if missing:
        raise SchemeError(
            f"scales are folded into blocks with the module names of Llama, and {type(block).__name__} has no "
            f"{', '.join(missing)}; choose a scheme without folding."
        )
    attention, mlp = (_pair(modules, *pair) for pair in _NORM_PAIRS)
    value, up = (_pair(modules, producer, (consumer,)) for producer, consumer in _LINEAR_PAIRS)
    pairs = [attention, value, mlp, up]
    return pairs if linears is None else [pair for pair in pairs if _touched(pair) <= set(linears)]


def fold_(block: nn.Module, pair: FoldPair, scale: Tensor) -> Tensor:
    """Divide the pair's channels by a scale where they are produced, and multiply the consumers' columns by it, in place.

    Args:
        block: the block; its weights are fp32 or fp64.
        pair: where.
        scale: [C], positive and finite.

    Returns:
        The scale [C] that was folded, in the producer's dtype: where the producer is a norm or has a bias, the one close to
        the wanted one with which these stay numbers that 16 bits hold (see `divide_stored`).

    Raises:
        ShapeError: not one scale a channel.
        SchemeError: a scale is not positive and finite.
    """
    if tuple(scale.shape) != (pair.channels,):
        raise ShapeError(f"{pair.producer} has {pair.channels} channels and takes as many scales, got {list(scale.shape)}.")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise SchemeError(f"scales of {pair.producer} must be positive and finite; its inputs or weights are not finite.")
    producer = block.get_submodule(pair.producer)
    weight, bias = producer.weight, getattr(producer, "bias", None)
    assert isinstance(weight, Tensor)
    stored = weight if pair.norm else bias
    exact = scale.to(torch.float64)
    with torch.no_grad():
        if isinstance(stored, Tensor):
            folded, exact = divide_stored(stored, scale)
            stored.copy_(folded)
        if not pair.norm:
            weight.copy_(weight.double() / exact[:, None])
        elif isinstance(bias, Tensor):
            bias.copy_(bias.double() / exact)
        columns = pair.expand(exact)
        for name in pair.consumers:
            consumer = block.get_submodule(name)
            assert isinstance(consumer.weight, Tensor)
            consumer.weight.copy_(consumer.weight.double() * columns)
    return exact.to(weight.dtype)


def divide_stored(vector: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Divide a vector that is stored in 16 bits by a scale that is close to the wanted one; all [C].

    Returns:
        w' = w / s as numbers of `STORED_DTYPE`, in w's dtype, and in fp64 the scale that makes this exact: w / w'; the wanted one
        where w is zero; 1 where w / s is too large or too small for the dtype.
    """
    wide, wanted = vector.double(), scale.double()
    rounded = (wide / wanted).to(STORED_DTYPE).double()
    fits = torch.isfinite(rounded) & (rounded.abs() >= torch.finfo(STORED_DTYPE).smallest_normal)
    folded = torch.where(fits, rounded, wide)
    exact = torch.where(fits, wide / torch.where(fits, rounded, 1.0), torch.where(wide == 0, wanted, 1.0))
    return folded.to(vector.dtype), exact


def folded_scales(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return what folding did to a weight: what its columns [K] were multiplied by, and its rows [N] divided by, fp32.

    Both are fitted to the quotients of the entries, log(after / before) = log(columns) - log(rows), by turns: means over rows,
    then over columns, again where zeros leave gaps. A factor that both share cannot be seen, and changes nothing: inputs are
    divided by it, and outputs by it again.

    Args:
        before: [N, K].
        after: [N, K] the same after any number of `fold_`.
    """
    live = (before != 0) & (after != 0)
    quotients = torch.where(live, after.double() / torch.where(live, before.double(), 1.0), 1.0).log()
    by_row = quotients.new_zeros(len(before), 1)
    for _ in range(1 if bool(live.all()) else FOLD_TURNS):
        by_column = torch.where(live, quotients - by_row, 0.0).sum(0) / live.sum(0).clamp_min(1)
        by_row = torch.where(live, quotients - by_column, 0.0).sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp_min(1)
    return by_column.exp().float(), (-by_row[:, 0]).exp().float()


def column_amax(block: nn.Module, pair: FoldPair) -> Tensor:
    """Return the largest |weight| that reads each channel [C], over all consumers, rows and repeats; fp32."""
    rows = [block.get_submodule(name).weight for name in pair.consumers]
    columns = torch.stack([row.detach().float().abs().amax(0) for row in rows if isinstance(row, Tensor)]).amax(0)
    return pair.gather(columns).amax(0)


def _touched(pair: FoldPair) -> set[str]:
    return set(pair.consumers) if pair.norm else {pair.producer, *pair.consumers}


def _pair(modules: Mapping[str, nn.Module], producer: str, consumers: tuple[str, ...]) -> FoldPair:
    source = getattr(modules[producer], "weight", None)
    if not isinstance(source, Tensor):
        raise SchemeError(f"{producer} has no weight to fold scales into; choose a scheme without folding.")
    channels = source.shape[0]
    widths = {_inputs(modules, name) for name in consumers}
    if len(widths) != 1:
        raise SchemeError(f"{', '.join(consumers)} read the same tensor and have {sorted(widths)} inputs; the model is broken.")
    (width,) = widths
    if width == channels:
        return FoldPair(producer, consumers, channels, norm=source.dim() == 1)
    head_dim = getattr(modules.get(producer.rpartition(".")[0]), "head_dim", None)
    if source.dim() == 1 or not isinstance(head_dim, int) or width % channels or channels % head_dim:
        raise SchemeError(
            f"{producer} has {channels} outputs and {', '.join(consumers)} {width} inputs, which whole heads of "
            f"{head_dim} cannot explain; choose a scheme without folding."
        )
    return FoldPair(producer, consumers, channels, head_dim, width // channels)


def _inputs(modules: Mapping[str, nn.Module], name: str) -> int:
    linear = modules.get(name)
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise SchemeError(f"{name} is no linear, and scales are folded into linears only.")
    return weight.shape[1]
