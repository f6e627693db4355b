"""Write a Hugging Face Llama checkpoint as GGUF for llama.cpp: bf16, and what llama.cpp itself quantizes from that.

Runs in the llama.cpp environment (numpy, gguf, llama-cpp-python). No vocabulary is written: the benchmark feeds token ids.

    python -m peers.gguf_weights CHECKPOINT OUT bf16
    python -m peers.gguf_weights OUT-BF16 OUT q4_0
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from peers.checkpoint_files import read_config, tensors, to_bf16, to_float32

FILE_TYPES = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
HEADS = {"q4_0": gguf.GGMLQuantizationType.Q4_0}
"""Types of the output head that are not llama.cpp's own choice: its Q4_0 files keep the head in Q6_K."""

GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls the tensor `name` of a Hugging Face Llama."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    if not name.startswith("model.layers.") or module not in LAYER_NAMES:
        raise ValueError(f"tensor {name} has no place in a GGUF Llama.")
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k: Hugging Face rotates rows (i, i + d/2) of a head together, llama.cpp rows (2i, 2i + 1)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def add_header(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write the shape of the model."""
    if config.get("rope_scaling"):
        raise ValueError(f"rope_scaling {config['rope_scaling']} is not written to GGUF here; use a model without it.")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name("bench_peers")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def write_bf16(folder: Path, out: Path) -> None:
    """Write the checkpoint with matrices in bf16 and norms in fp32, as llama.cpp wants them."""
    config = read_config(folder)
    writer = gguf.GGUFWriter(str(out), "llama")
    add_header(writer, config)
    heads = config["num_attention_heads"]
    rotated = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    for name, kind, stored in tensors(folder):
        module = name.split(".")[-2]
        array = interleave_halves(stored, rotated[module]) if module in rotated else stored
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), to_float32(kind, array))
        else:
            rows = np.ascontiguousarray(to_bf16(kind, array)).view(np.uint8)
            writer.add_tensor(gguf_name(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, kind: str) -> None:
    """Let llama.cpp quantize a bf16 GGUF with its own choices, except for the head's type in `HEADS`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = os.cpu_count() or 1
    if kind in HEADS:
        params.output_tensor_type = int(HEADS[kind])
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}.")


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description="Write GGUF weights.")
    parser.add_argument("source", type=Path, help="a Hugging Face folder (for bf16), or a bf16 GGUF")
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", choices=["bf16", *FILE_TYPES])
    options = parser.parse_args()
    if options.kind == "bf16":
        write_bf16(options.source, options.out)
    else:
        quantize(options.source, options.out, options.kind)


if __name__ == "__main__":
    main()
