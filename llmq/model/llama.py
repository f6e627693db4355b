"""Llama: the family's one model, with Hugging Face's parameter names. There is no quantization in it.

    tokens [B, T] -> embed -> h [B, T, hidden] -> block 0 … L-1 -> head (RMSNorm, lm_head) -> logits [B, T, vocab]

Every linear is an nn.Linear and is only ever called, so that its weight may be replaced by any tensor that F.linear
understands. The model has parameters and no buffers: what depends on positions is made per call or kept in the KV cache,
so a model built on the meta device is complete once `load_state_dict(..., assign=True)` has filled it.

Precision: RMSNorm and the rotation compute in fp32 and round once, whatever the dtype of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache, check_context
from llmq.model.rope import inverse_frequencies, rotate, rotation_table
from llmq.ops.decode_attention import fused_attention, most_tokens
from llmq.ops.schema import Support


@dataclass(frozen=True)
class Sight:
    """Which keys the queries of one call see, for one kind of layer.

    Attributes:
        first: the first key to look at.
        stop: the one after the last. Not a slice of both: torch.compile would fix a slice's ends, and compile for each length.
        mask: added to the scores [T, keys], 0 or -inf; None: every key is seen, or `causal` says which.
        causal: query i sees keys 0 … i.
    """

    first: int
    stop: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True)
class BlockContext:
    """What every block of one call shares; `Llama.context` makes it.

    Attributes:
        cosines: float32 [T, 1, D].
        sines: float32 [T, 1, D]; see `rope.rotation_table`.
        full: what layers without a window see.
        sliding: what layers with a window see.
        cache: where keys and values are kept; None: there are no others than the call's own.
        where: the positions of the call in the cache: the first and the one after the last, or all of them, int64 [T].
        position: integer [1], that of the first token, where `llmq::decode_attention` attends; `full` and `sliding` are then not
            looked at. None: SDPA attends.
    """

    cosines: Tensor
    sines: Tensor
    full: Sight
    sliding: Sight
    cache: KVCache | None
    where: tuple[int, int] | Tensor
    position: Tensor | None = None


class Attention(nn.Module):
    """Causal self-attention with grouped queries (GQA, arXiv:2305.13245); one key-value head serves H / H_kv queries."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.window(layer)
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_output_bias)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Return the attention's output for `x`, both [B, T, hidden]."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # [B, H_kv, T, D]
        q = rotate(q, context.cosines, context.sines).transpose(1, 2)  # [B, H, T, D]
        k = rotate(k, context.cosines, context.sines).transpose(1, 2)
        sight = context.full if self.window is None else context.sliding
        if context.cache is None:
            k = k.to(x.dtype)
        else:
            context.cache.write(self.layer, k, v, slice(*context.where) if isinstance(context.where, tuple) else context.where)
            if context.position is not None:
                q = q.to(context.cache.attention_dtype(x.dtype))
                y = torch.ops.llmq.decode_attention(q, *context.cache.stored(self.layer), context.position, self.window)
                fused: Tensor = self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))
                return fused
            k, v = context.cache.read(self.layer, slice(sight.first, sight.stop), x.dtype)
        q = q.to(k.dtype)
        if T == 1:
            # The heads that share keys become the rows of one small query matrix, so that each key is read once, and not
            # once for each of them.
            q = q.reshape(B, self.num_kv_heads, -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask).reshape(B, T, -1)
        else:
            grouped = self.num_heads != self.num_kv_heads
            if grouped and k.dtype == torch.float32 and k.device.type != "cpu":
                # torch's fused attention for GPUs takes fp32, or heads that share keys, not both; without it all scores are held
                k, v = (shared.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for shared in (k, v))
                grouped = False
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, is_causal=sight.causal, enable_gqa=grouped)
            y = y.transpose(1, 2).reshape(B, T, -1)
        out: Tensor = self.o_proj(y.to(x.dtype))
        return out


class MLP(nn.Module):
    """The gated MLP, SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output for `x`, both [B, T, hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: attention and MLP, each behind an RMSNorm (arXiv:1910.07467) and added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, h: Tensor, context: BlockContext) -> Tensor:
        """Return the residual stream after this layer; `h` and the result are [B, T, hidden]."""
        h = h + self.self_attn(self.input_layernorm(h), context)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


def _embedding(config: LlamaConfig) -> nn.Embedding:
    """Return an embedding with random numbers, except on the meta device: there torch would load its compiler to draw them."""
    table = torch.empty(config.vocab_size, config.hidden_size)
    table = table if table.is_meta else nn.init.normal_(table)
    made: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]  # torch's own gap
    return made


class Trunk(nn.Module):
    """Everything but the head; it exists for its name, `model`, in Hugging Face's parameter names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = _embedding(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A causal language model of the Llama family.

    Build it under `torch.device("meta")` and fill it with `load_state_dict(state, assign=True)`: nothing is copied. When
    the embeddings are tied and `state` has no lm_head.weight, the head gets the embedding's own parameter.

    Attributes:
        fused_caches: the dtypes of the caches to which calls of a few tokens attend in one fused kernel; see `fuse_attention`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies = inverse_frequencies(config)  # a plain tensor: always real, never in a state dict
        self.fused_caches: frozenset[torch.dtype] = frozenset()
        if config.tie_word_embeddings:
            self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_after_load)  # type: ignore[no-untyped-call]  # torch's own gap

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, in order; each maps (h, context) to h."""
        return self.model.layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, of the residual stream and of the logits."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and where tokens and cache have to be."""
        return self.model.embed_tokens.weight.device

    def fuse_attention(self) -> Support:
        """Let calls of a few tokens attend to their cache in one fused kernel, for the caches for which this machine can.

        Returns:
            Whether it can for a cache of the model's own dtype, or why not; SDPA then attends as before.
        """
        share, size = self.config.num_heads // self.config.num_kv_heads, self.config.head_dim
        answers = {cache: fused_attention(self.dtype, cache, share, size) for cache in (self.dtype, torch.int8)}
        self.fused_caches = frozenset(cache for cache, answer in answers.items() if answer.ok)
        return answers[self.dtype]

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's parameter itself."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the logits of every token.

        Args:
            tokens: int64 [B, T].
            cache: where the keys and values of positions before `start` are, and where those of `tokens` go. A call with
                a cache is inference: it records no gradients.
            start: position of the first token. An int reads only the filled part of the cache, which is the fast way in
                eager mode. A tensor of one integer reads the whole cache under a mask: all its steps have the same shapes,
                so that torch.compile compiles once; `start + T <= cache.max_length` is then the caller's care.

        Returns:
            logits [B, T, vocab], in the model's dtype.

        Raises:
            UsageError: the tokens do not fit into the context or the cache, or the batch is not the cache's.
        """
        return self.head(self.hidden(tokens, cache, start))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the residual stream [B, T, hidden] that `head` takes; the arguments are those of `forward`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            h = self.embed(tokens)
            context = self.context(h, cache, start)
            for block in self.blocks:
                h = block(h, context)
        return h

    def last_logits(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the logits [B, 1, vocab] of each sequence's last token; the arguments are those of `forward`.

        The head is not computed for the others: with a vocabulary of 128 k, a prompt of 2,048 tokens would need 0.5 GB for
        logits that nobody looks at.
        """
        return self.head(self.hidden(tokens, cache, start)[:, -1:])

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the residual stream [B, T, hidden] before the first block, for `tokens` int64 [B, T]."""
        h: Tensor = self.model.embed_tokens(tokens)
        return h

    def head(self, h: Tensor) -> Tensor:
        """Return logits [B, T, vocab] for the residual stream [B, T, hidden] after the last block."""
        logits: Tensor = self.lm_head(self.model.norm(h))
        return logits

    def context(self, h: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> BlockContext:
        """Return what the blocks need besides `h` [B, T, hidden]; it depends on T, dtype and device only, not on values.

        Without a cache, one context serves any number of batches of the same length.

        Raises:
            UsageError: see `forward`.
        """
        B, T, _ = h.shape
        if cache is None:
            check_context(T, self.config)
            positions = torch.arange(T, device=h.device)
            cosines, sines = rotation_table(self.frequencies.to(h.device), positions)
            return self._context(cosines, sines, cache, (0, T), h.dtype)
        dtype = cache.attention_dtype(h.dtype)
        cache.check(B, 0 if isinstance(start, Tensor) else start, T)
        position = self._position(cache, start, T)
        if isinstance(start, Tensor):
            if start.numel() != 1:
                raise UsageError(f"start must be one position for the whole batch, got a tensor of shape {tuple(start.shape)}.")
            positions = start + torch.arange(T, device=h.device)  # [T], from [] or [1]
            return self._context(cache.cosines[positions], cache.sines[positions], cache, positions, dtype, position)
        stop = start + T
        return self._context(cache.cosines[start:stop], cache.sines[start:stop], cache, (start, stop), dtype, position)

    def _position(self, cache: KVCache, start: int | Tensor, tokens: int) -> Tensor | None:
        """Return the position of the first token as the fused attention takes it, or None where SDPA attends."""
        share = self.config.num_heads // self.config.num_kv_heads
        if cache.dtype not in self.fused_caches or tokens > most_tokens(self.dtype, share, self.config.head_dim):
            return None
        if isinstance(start, Tensor):
            return start.reshape(1)
        return torch.full((1,), start, device=self.device)  # a fill: nothing is copied from the host, or waited for

    def _context(
        self,
        cosines: Tensor,
        sines: Tensor,
        cache: KVCache | None,
        where: tuple[int, int] | Tensor,
        dtype: torch.dtype,
        position: Tensor | None = None,
    ) -> BlockContext:
        if position is not None:
            return BlockContext(cosines, sines, _NOTHING, _NOTHING, cache, where, position)
        length = cache.max_length if cache is not None else 0
        full = _sight(where, None, length, dtype, cosines.device)
        window = self.config.sliding_window
        sliding = full if window is None else _sight(where, window, length, dtype, cosines.device)
        return BlockContext(cosines, sines, full, sliding, cache, where)


_NOTHING = Sight(0, 0, None, causal=False)
"""What SDPA looks at where it does not attend."""


def _sight(where: tuple[int, int] | Tensor, window: int | None, length: int, dtype: torch.dtype, device: torch.device) -> Sight:
    """Return what queries at the positions `where` see of the keys at 0 … `length` - 1, with or without a window."""
    if isinstance(where, Tensor):
        return Sight(0, length, _mask(where, torch.arange(length, device=device), window, dtype), causal=False)
    start, stop = where
    first = 0 if window is None else max(0, start - window + 1)
    if stop - start == 1:
        return Sight(first, stop, None, causal=False)
    if start == 0 and (window is None or window >= stop):
        return Sight(first, stop, None, causal=True)
    queries = torch.arange(start, stop, device=device)
    return Sight(first, stop, _mask(queries, torch.arange(first, stop, device=device), window, dtype), causal=False)


def _mask(queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores [T, S]: 0 where query position sees key position, -inf elsewhere."""
    distance = queries[:, None] - keys
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _tie_after_load(module: nn.Module, incompatible: Any) -> None:
    """Tie the head again after `load_state_dict`, which gives each name its own parameter; a head that came is kept."""
    assert isinstance(module, Llama)
    if module.config.tie_word_embeddings and "lm_head.weight" in incompatible.missing_keys:
        incompatible.missing_keys.remove("lm_head.weight")
        module.tie_weights()
