"""llama.cpp's own quantizer with an importance matrix, by llama-cpp-python. Runs in the environment `llama_cpp`.

The importance of an input is what llama.cpp's `imatrix` tool computes: the mean of its squares over the calibration tokens, of
the original model. It comes in the order (settings: imatrix, an .npz file by the names of the matrices), computed in float32.
Embeddings and head are kept in bf16, as the checkpoint has them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from peers.checkpoint_files import read_config
from peers.gguf_weights import GLOBAL_NAMES, LAYER_NAMES, gguf_name, write_bf16

from quality.exchange import Made, Order, hand_over, is_handed_over, timed, versions_of

MODULES = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
GLOBALS = {ours: theirs for theirs, ours in GLOBAL_NAMES.items()}


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a tensor of a GGUF Llama."""
    if name in GLOBALS:
        return GLOBALS[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{kind}"


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo `peers.gguf_weights.interleave_halves`: rows (2i, 2i + 1) of a head become rows (i, i + d/2)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def quantize(source: Path, out: Path, kind: str, importance: dict[str, np.ndarray], threads: int) -> None:
    """Let llama.cpp quantize a bf16 GGUF to its file type `kind`."""
    entries = [(gguf_name(name).encode(), np.ascontiguousarray(values, np.float32)) for name, values in importance.items()]
    matrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()  # the last one, without a name, ends it
    for slot, (name, values) in zip(matrix, entries, strict=False):
        slot.name, slot.size = name, values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads
    params.output_tensor_type = params.token_embedding_type = int(gguf.GGMLQuantizationType.BF16)
    if entries:
        params.imatrix = matrix
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}.")


def main() -> None:
    """Quantize as the order says: kind, imatrix."""
    order = Order.read()
    folder, config = Path(order.out), read_config(Path(order.checkpoint))
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    plain, quantized = folder / "bf16.gguf", folder / "quantized.gguf"
    write_bf16(Path(order.checkpoint), plain)
    imatrix = order.settings.get("imatrix")
    importance = dict(np.load(imatrix)) if imatrix else {}
    with timed() as cost:
        quantize(plain, quantized, order.settings["kind"], importance, order.threads)
    weights: dict[str, np.ndarray] = {}
    types: dict[str, int] = {}
    stored = elements = 0
    for tensor in gguf.GGUFReader(quantized).tensors:
        name = hf_name(tensor.name)
        if not is_handed_over(name):
            assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16, name
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        module = name.split(".")[-2]
        weights[name] = halves(weight, heads[module]) if module in heads else weight
        if len(shape) == 2:
            stored, elements = stored + int(tensor.n_bytes), elements + int(tensor.n_elements)
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    plain.unlink()
    quantized.unlink()
    versions = versions_of("llama-cpp-python", "gguf")
    settings = {"kind": order.settings["kind"], "imatrix": bool(imatrix), "matrices": types}
    hand_over(folder, weights, Made(8 * stored / elements, cost, versions, settings))


if __name__ == "__main__":
    main()
