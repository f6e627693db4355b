"""One random model, written in every format that llmq reads."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_ids=(2,),
)
LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
ROW_PARALLEL = ("attention.wo.weight", "feed_forward.w2.weight")


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Hugging Face's order of q and k rows to Meta's."""
    n, k = weight.shape
    return weight.view(heads, 2, n // heads // 2, k).transpose(1, 2).reshape(n, k).contiguous()


@dataclass
class Writer:
    """Writes one state dict (Hugging Face names) as a checkpoint of each format into folders of `root`."""

    root: Path
    config: LlamaConfig = CONFIG
    dtype: torch.dtype = torch.float32
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state:
            return
        torch.manual_seed(7)
        for name, tensor in Llama(self.config).state_dict().items():
            if self.config.tie_word_embeddings and name == "lm_head.weight":
                continue
            value = 1 + 0.1 * torch.randn(tensor.shape) if tensor.dim() == 1 else 0.2 * torch.randn(tensor.shape)
            self.state[name] = value.to(self.dtype)

    def model(self) -> Llama:
        """The model itself, in memory."""
        model = Llama(self.config)
        model.load_state_dict(self.state, assign=True)
        return model.eval()

    def logits(self, model: Llama | None = None) -> Tensor:
        """Logits of fixed tokens."""
        tokens = torch.arange(10).view(2, 5) * 5 + 1
        with torch.no_grad():
            return (model or self.model())(tokens)

    def tied(self) -> Writer:
        """The same with the head tied to the embedding."""
        state = {name: tensor for name, tensor in self.state.items() if name != "lm_head.weight"}
        return replace(self, config=replace(self.config, tie_word_embeddings=True), state=state)

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        return path

    def hf(self, name: str = "hf", *, shards: int = 1, index: bool = True) -> Path:
        folder = self.folder(name)
        (folder / "config.json").write_text(json.dumps(self.config.to_hf()))
        names = list(self.state)
        cuts = [names[start::shards] for start in range(shards)]
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
        for file, part in zip(files, cuts, strict=True):
            save_file({key: self.state[key] for key in part}, folder / file)
        if shards > 1 and index:
            weight_map = {key: file for file, part in zip(files, cuts, strict=True) for key in part}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def meta_state(self) -> dict[str, Tensor]:
        top = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
        state = {}
        for name, tensor in self.state.items():
            stem = name.removesuffix(".weight")
            if stem in top:
                state[f"{top[stem]}.weight"] = tensor
                continue
            _, _, layer, rest = stem.split(".", 3)
            heads = {"self_attn.q_proj": self.config.num_heads, "self_attn.k_proj": self.config.num_kv_heads}.get(rest)
            state[f"layers.{layer}.{LAYER[rest]}.weight"] = interleave(tensor, heads) if heads else tensor
        return state

    def params(self) -> dict[str, Any]:
        config = self.config
        return {
            "dim": config.hidden_size,
            "n_layers": config.num_layers,
            "n_heads": config.num_heads,
            "n_kv_heads": config.num_kv_heads,
            "vocab_size": -1,
            "norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "max_seq_len": config.max_position_embeddings,
        }

    def meta(self, name: str = "meta", *, shards: int = 1, vocab_parallel: bool = False) -> Path:
        folder = self.folder(name)
        (folder / "params.json").write_text(json.dumps(self.params()))
        for rank in range(shards):
            part = {}
            for key, tensor in self.meta_state().items():
                if tensor.dim() == 1:
                    part[key] = tensor
                    continue
                by_row = key in ("tok_embeddings.weight",) and not vocab_parallel
                dim = 1 if by_row or key.endswith(ROW_PARALLEL) else 0
                part[key] = tensor.chunk(shards, dim)[rank].clone()
            part["rope.freqs"] = torch.ones(self.config.head_dim // 2)
            torch.save(part, folder / f"consolidated.{rank:02d}.pth")
        return folder

    def gpt_fast(self, name: str = "gpt-fast", *, config: str = "hf") -> Path:
        folder = self.folder(name)
        state = self.meta_state()
        for layer in range(self.config.num_layers):
            parts = [state.pop(f"layers.{layer}.attention.{part}.weight") for part in ("wq", "wk", "wv")]
            state[f"layers.{layer}.attention.wqkv.weight"] = torch.cat(parts)
        torch.save(state, folder / "model.pth")
        if config == "hf":
            (folder / "config.json").write_text(json.dumps(self.config.to_hf()))
        elif config == "params":
            (folder / "params.json").write_text(json.dumps(self.params()))
        return folder

    def llama2c(self, name: str = "llama2c", *, version: int = 0, tables: bool = True) -> Path:
        config, state = self.config, self.meta_state()
        path = self.folder(name) / "model.bin"
        sizes = [config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads]
        tied = config.tie_word_embeddings
        layers = range(config.num_layers)

        def every(part: str) -> list[Tensor]:
            return [state[f"layers.{layer}.{part}.weight"] for layer in layers]

        attention = [*every("attention.wq"), *every("attention.wk"), *every("attention.wv"), *every("attention.wo")]
        mlp = [*every("feed_forward.w1"), *every("feed_forward.w2"), *every("feed_forward.w3")]
        embedding, norm = state["tok_embeddings.weight"], state["norm.weight"]
        head = [] if tied else [state["output.weight"]]
        if version == 0:
            header = struct.pack("<7i", *sizes, config.vocab_size if tied else -config.vocab_size, config.max_position_embeddings)
            frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
            angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
            rope = [angles.cos(), angles.sin()] if tables else [torch.zeros_like(angles)] * 2
            arrays = [embedding, *every("attention_norm"), *attention, *every("ffn_norm"), *mlp, norm, *rope, *head]
        else:
            header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, config.vocab_size, config.max_position_embeddings, tied)
            header += bytes(256 - len(header))
            arrays = [*every("attention_norm"), *every("ffn_norm"), norm, embedding, *attention, *mlp, *head]
        path.write_bytes(header + b"".join(array.float().contiguous().numpy().tobytes() for array in arrays))
        return path.parent
