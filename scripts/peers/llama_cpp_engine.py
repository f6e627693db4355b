"""llama.cpp through llama-cpp-python's low-level API: llama_decode on batches, and nothing in between."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import gguf
import llama_cpp
import numpy as np

from peers.protocol import Order, StepEngine, mean_loss, serve

BATCH = 512
"""Tokens that one llama_decode takes: n_batch and n_ubatch."""


class LlamaCpp(StepEngine):
    """One GGUF file, and a context for each number of sequences that has been asked for."""

    def __init__(self, order: Order) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(order.weights).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {order.weights}.")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.order = order
        self.contexts: dict[int, Any] = {}
        self.active: Any = None
        self.position = 0
        self.entries = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def info(self) -> dict[str, Any]:
        """See `Engine.info`."""
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(self.order.weights).tensors}
        head = tensors.get("output.weight", tensors["token_embd.weight"])
        total = sum(int(tensor.n_bytes) for tensor in tensors.values())
        table = int(tensors["token_embd.weight"].n_bytes) if "output.weight" in tensors else 0
        return {
            "version": llama_cpp.__version__,
            "head": head.tensor_type.name.lower(),
            "bytes": total,
            "step_bytes": total - table,
            "settings": {"n_batch": BATCH, "n_ubatch": BATCH, "flash_attn": "auto", "kv_cache": "f16"},
            "build": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    def open(self, sequences: int) -> Any:
        """Return the context for so many sequences, emptied; made when first asked for."""
        if sequences not in self.contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = self.order.context * sequences
            params.n_batch = params.n_ubatch = BATCH
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self.order.threads
            params.no_perf = True
            context = llama_cpp.llama_init_from_model(self.model, params)
            if not context:
                raise RuntimeError(f"llama.cpp could not make a context of {params.n_ctx} tokens.")
            self.contexts[sequences] = context
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.contexts[sequences]), False)
        return self.contexts[sequences]

    def run(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Run entries (token, position, sequence, wants its logits), at most `BATCH`."""
        batch = self.entries
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        if llama_cpp.llama_decode(self.active, batch) != 0:
            raise RuntimeError("llama_decode failed.")

    def read(self, tokens: list[int], sequence: int) -> None:
        """Read a prompt into one sequence; the last token's logits are kept."""
        last = len(tokens) - 1
        entries = [(token, index, sequence, index == last) for index, token in enumerate(tokens)]
        for begin in range(0, len(entries), BATCH):
            self.run(entries[begin : begin + BATCH])
        self.position = len(tokens)

    def rows(self, count: int) -> np.ndarray:
        """Return the logits [count, vocab] that the last run kept, in llama.cpp's own memory."""
        pointer = ctypes.cast(llama_cpp.llama_get_logits(self.active), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (count, self.vocab))

    def start(self, tokens: list[int], room: int) -> np.ndarray:
        """See `StepEngine.start`."""
        del room  # the context is made for the longest
        self.active = self.open(1)
        self.read(tokens, 0)
        return self.rows(1).reshape(-1)

    def step(self, token: int) -> np.ndarray:
        """See `StepEngine.step`."""
        self.run([(token, self.position, 0, True)])
        self.position += 1
        return self.rows(1).reshape(-1)

    def batch(self, tokens: list[int], new_tokens: int, rows: int) -> list[float]:
        """See `Engine.batch`; each sequence has its own keys and values."""
        self.active = self.open(rows)
        for row in range(rows):
            self.read(tokens, row)
        chosen = [int(self.rows(1)[0].argmax())] * rows
        seconds = []
        for _ in range(new_tokens):
            begin = time.perf_counter()
            self.run([(token, self.position, row, True) for row, token in enumerate(chosen)])
            chosen = [int(token) for token in self.rows(rows).argmax(-1)]
            self.position += 1
            seconds.append(time.perf_counter() - begin)
        return seconds

    def score(self, tokens: list[int]) -> float:
        """See `Engine.score`."""
        if len(tokens) > BATCH:
            raise RuntimeError(f"a window of {len(tokens)} tokens is longer than a batch of {BATCH}.")
        self.active = self.open(1)
        self.run([(token, index, 0, True) for index, token in enumerate(tokens)])
        return mean_loss(self.rows(len(tokens)), tokens, self.order.threads)


if __name__ == "__main__":
    serve(LlamaCpp)
