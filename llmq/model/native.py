"""NativeLlama: a model's forward pass as one call of the native library, over the weights that `prepare` has laid out.

It computes what `Llama` does, with its roundings (kernels/cpu/llmq_cpu.h, section `llama`, lists them); sums inside attention
and norms are fp32 in another order, and attention never rounds its weights. An int8 cache is read as code * scale in fp32, where
torch needs tensors and rounds them to the model's dtype. `Llama` stays the reference: the tests compare the two token by token.

What it saves is everything between the linears: a decode step of torch is some 25 operators a block, each with its own dispatch,
its own memory and its own team of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache, check_context
from llmq.model.llama import Block, Llama
from llmq.model.rope import inverse_frequencies, rotation_table
from llmq.ops import native, native_abi
from llmq.ops.cpu import linear_struct
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import current_usage

_DTYPES = {torch.float32: native_abi.DTYPE_F32, torch.bfloat16: native_abi.DTYPE_BF16}
_CACHES = {
    torch.float32: native_abi.CACHE_F32,
    torch.bfloat16: native_abi.CACHE_BF16,
    torch.int8: native_abi.CACHE_INT8,
}
_KEYS_PER_TASK = 256
"""A workspace grows with each so many tokens before the call."""


def obstacle(model: Llama, kv_dtype: torch.dtype | None = None) -> str | None:
    """Return why the native runtime cannot run `model` with a KV cache of `kv_dtype` (None: the model's); None: it can."""
    status = native.status()
    if isinstance(status, native.Unavailable):
        return status.reason.removesuffix(".")
    if model.device.type != "cpu":
        return f"it is for CPUs, and the model is on {model.device.type}"
    if model.dtype not in _DTYPES:
        return f"it computes in float32 or bfloat16, and the model is {model.dtype}"
    if kv_dtype is not None and kv_dtype not in _CACHES:
        return f"it reads KV caches of {', '.join(map(str, _CACHES))}, and this one is {kv_dtype}"
    if type(model.model.embed_tokens.weight) not in (Tensor, nn.Parameter):
        return "the embedding is not a plain tensor"
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = _linear_obstacle(module, model.dtype)
            if reason:
                return f"{fqn} {reason}"
    return None


def _linear_obstacle(linear: nn.Linear, dtype: torch.dtype) -> str | None:
    weight = linear.weight
    if not isinstance(weight, QuantizedTensor):
        return "holds a plain tensor; apply a scheme (bf16 or fp32 change nothing) and prepare() it"
    if weight.dtype != dtype:
        return f"computes in {weight.dtype}, and the model in {dtype}"
    if not weight.kernel_layout.startswith("native-"):
        return f"is laid out for {', '.join(weight.kernels)}"
    return None


@dataclass(frozen=True)
class _Bound:
    """A struct that native code reads, and what keeps its addresses alive."""

    struct: ctypes.Structure
    address: int
    owners: tuple[object, ...]


class NativeLlama:
    """Runs a `Llama` whose linears are all in native layouts; see the module.

    It holds the memory of the weights as they are when it is made: prepare the model first, and make a new one after any change.
    Calls record no gradients. Any number of threads may call at once.

    Args:
        model: the model.

    Raises:
        UsageError: `obstacle` says why the model cannot be run.
    """

    def __init__(self, model: Llama) -> None:
        reason = obstacle(model)
        if reason:
            raise UsageError(f"the native runtime cannot run this model: {reason}.")
        self.model = model
        self.config: LlamaConfig = model.config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._library = native.kernels()
        self._bound = _bind_model(model)
        self._caches: WeakKeyDictionary[KVCache, _Bound] = WeakKeyDictionary()
        self._spare: list[Tensor] = []
        self._sizes: dict[tuple[str, tuple[int, ...]], int] = {}
        body = [block for block in model.blocks.modules() if isinstance(block, nn.Linear)]
        self._body_kernels, self._head_kernel = [_kernel_of(linear) for linear in body], _kernel_of(model.lm_head)

    @property
    def isa(self) -> str:
        """Name of the instruction set that runs."""
        return self._library.name

    def __call__(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the logits of every token; see `Llama.forward`."""
        return self._forward(tokens, cache, start, native_abi.OUTPUT_ALL)

    forward = __call__

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the residual stream that `head` takes; see `Llama.hidden`."""
        return self._forward(tokens, cache, start, native_abi.OUTPUT_HIDDEN)

    def last_logits(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the logits [B, 1, vocab] of each sequence's last token; see `Llama.last_logits`."""
        return self._forward(tokens, cache, start, native_abi.OUTPUT_LAST)

    def head(self, h: Tensor) -> Tensor:
        """Return logits [..., vocab] for the residual stream [..., hidden]; see `Llama.head`."""
        if h.dtype != self.dtype or h.shape[-1] != self.config.hidden_size:
            raise UsageError(
                f"the head takes [..., {self.config.hidden_size}] of {self.dtype}, got {list(h.shape)} of {h.dtype}."
            )
        rows = h.contiguous()
        m = rows.numel() // self.config.hidden_size
        out = torch.empty(*h.shape[:-1], self.config.vocab_size, dtype=self.dtype)
        if m:
            threads = torch.get_num_threads()
            workspace = self._workspace("llmq_llama_head_workspace_bytes", m, threads)
            self._library.call(
                "llmq_llama_head", self._bound.address, rows.data_ptr(), out.data_ptr(), workspace.data_ptr(), m, threads
            )
            self._spare.append(workspace)
            self._count(body=False, head=True)
        return out

    def _forward(self, tokens: Tensor, cache: KVCache | None, start: int | Tensor, output: int) -> Tensor:
        B, T = tokens.shape
        config = self.config
        position = int(start)
        if cache is None:
            check_context(T, config)
            bound = _bind_scratch(config, B, T, self.dtype)
        else:
            cache.check(B, position, T)
            bound = self._cache(cache)
        shape = {
            native_abi.OUTPUT_HIDDEN: (B, T, config.hidden_size),
            native_abi.OUTPUT_LAST: (B, 1, config.vocab_size),
            native_abi.OUTPUT_ALL: (B, T, config.vocab_size),
        }[output]
        out = torch.empty(shape, dtype=self.dtype)
        if B == 0 or T == 0:
            return out
        ids = tokens if tokens.dtype is torch.int64 and tokens.is_contiguous() else tokens.to(torch.int64).contiguous()
        threads = torch.get_num_threads()
        enough = (position // _KEYS_PER_TASK + 1) * _KEYS_PER_TASK - 1  # one size for all positions of a task
        workspace = self._workspace("llmq_llama_workspace_bytes", B, T, enough, threads)
        self._library.call(
            "llmq_llama_forward",
            self._bound.address,
            bound.address,
            ids.data_ptr(),
            B,
            T,
            position,
            output,
            out.data_ptr(),
            workspace.data_ptr(),
            threads,
        )
        self._spare.append(workspace)
        self._count(body=True, head=output != native_abi.OUTPUT_HIDDEN)
        return out

    def _cache(self, cache: KVCache) -> _Bound:
        bound = self._caches.get(cache)
        if bound is None:
            if cache.dtype not in _CACHES:
                raise UsageError(
                    f"the native runtime reads KV caches of fp32, bf16 and int8, got {cache.dtype}; use --runtime torch."
                )
            bound = _bind_cache(cache)
            self._caches[cache] = bound
        return bound

    def _workspace(self, symbol: str, *arguments: int) -> Tensor:
        """Return memory that no other call uses; whoever is done puts it back, so that the next call finds its pages there.

        The sizes that the library asks for are kept, because asking takes as long as a small block.
        """
        size = self._sizes.get((symbol, arguments))
        if size is None:
            found = ctypes.c_int64()
            self._library.call(symbol, self._bound.address, *arguments, ctypes.byref(found))
            size = self._sizes[symbol, arguments] = found.value
        try:
            workspace = self._spare.pop()
        except IndexError:
            return torch.empty(size, dtype=torch.uint8)
        return workspace if workspace.numel() >= size else torch.empty(size, dtype=torch.uint8)

    def _count(self, *, body: bool, head: bool) -> None:
        usage = current_usage()
        if usage is None:
            return
        for name, weight in (*(self._body_kernels if body else ()), *((self._head_kernel,) if head else ())):
            usage.add(name, weight)


def _kernel_of(linear: nn.Linear) -> tuple[str, int]:
    """Name of the kernel that a linear's layout belongs to, and the identity under which `record_usage` counts its weight."""
    assert isinstance(linear.weight, QuantizedTensor)
    return linear.weight.pick(1).name, id(linear.weight.stored[0])


def _bind_model(model: Llama) -> _Bound:
    """Describe a model to the library."""
    config = model.config
    owners: list[object] = []
    blocks = (native_abi.LlmqBlock * config.num_layers)()
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        blocks[index] = native_abi.LlmqBlock(
            q=_linear(attention.q_proj, owners),
            k=_linear(attention.k_proj, owners),
            v=_linear(attention.v_proj, owners),
            o=_linear(attention.o_proj, owners),
            gate=_linear(mlp.gate_proj, owners),
            up=_linear(mlp.up_proj, owners),
            down=_linear(mlp.down_proj, owners),
            attention_norm=_floats(block.input_layernorm.weight, owners),
            mlp_norm=_floats(block.post_attention_layernorm.weight, owners),
            window=config.window(index) or 0,
        )
    embedding = model.model.embed_tokens.weight.detach().contiguous()
    owners += [blocks, embedding]
    struct = native_abi.LlmqLlama(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=_DTYPES[model.dtype],
        norm_eps=config.rms_norm_eps,
        embedding=embedding.data_ptr(),
        final_norm=_floats(model.model.norm.weight, owners),
        blocks=ctypes.addressof(blocks),
        head=_linear(model.lm_head, owners),
    )
    return _Bound(struct, ctypes.addressof(struct), tuple(owners))


def _linear(linear: nn.Linear, owners: list[object]) -> native_abi.LlmqLinear:
    weight = linear.weight
    assert isinstance(weight, QuantizedTensor)
    bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
    owners += [weight.stored, bias]
    return linear_struct(weight.spec.case, weight.stored, bias)


def _floats(tensor: Tensor, owners: list[object]) -> int:
    """Return the address of a vector as contiguous fp32, kept by `owners`."""
    numbers = tensor.detach().float().contiguous()
    owners.append(numbers)
    return numbers.data_ptr()


def _bind_cache(cache: KVCache) -> _Bound:
    """Describe a cache to the library; whoever holds the result need not hold the cache's tensors."""
    pointers = [_pointers(tensors) for tensors in (cache.keys, cache.values, cache.key_scales, cache.value_scales)]
    struct = native_abi.LlmqKVCache(
        batch=cache.batch_size,
        length=cache.max_length,
        dtype=_CACHES[cache.dtype],
        keys=_address(pointers[0]),
        values=_address(pointers[1]),
        key_scales=_address(pointers[2]),
        value_scales=_address(pointers[3]),
        cosines=cache.cosines.data_ptr(),
        sines=cache.sines.data_ptr(),
    )
    return _Bound(struct, ctypes.addressof(struct), (pointers, cache.tensors, cache.cosines, cache.sines))


def _bind_scratch(config: LlamaConfig, batch: int, length: int, dtype: torch.dtype) -> _Bound:
    """Describe memory for the keys and values of one call without a cache. All layers share it: each is done with it in turn."""
    keys, values = torch.empty(2, batch, config.num_kv_heads, length, config.head_dim, dtype=dtype)
    cosines, sines = _angles(config, length)
    pointers = [_pointers([tensor] * config.num_layers) for tensor in (keys, values)]
    struct = native_abi.LlmqKVCache(
        batch=batch,
        length=length,
        dtype=_CACHES[dtype],
        keys=_address(pointers[0]),
        values=_address(pointers[1]),
        cosines=cosines.data_ptr(),
        sines=sines.data_ptr(),
    )
    return _Bound(struct, ctypes.addressof(struct), (pointers, keys, values, cosines, sines))


@lru_cache(maxsize=4)
def _angles(config: LlamaConfig, length: int) -> tuple[Tensor, Tensor]:
    """The rotary tables of positions 0 … length - 1."""
    return rotation_table(inverse_frequencies(config), torch.arange(length))


def _pointers(tensors: list[Tensor] | None) -> ctypes.Array[ctypes.c_void_p] | None:
    return None if tensors is None else (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _address(pointers: ctypes.Array[ctypes.c_void_p] | None) -> int | None:
    return None if pointers is None else ctypes.addressof(pointers)
