"""OpenVINO GenAI's LLMPipeline with continuous batching (paged attention), its default and fastest way on a CPU.

The pipeline gives tokens and times, no logits; those of the check come from the same files in a plain inference request.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai

from peers.protocol import Engine, Order, serve

CACHE_GB = 1


class OpenVino(Engine):
    """One folder that optimum-intel exported."""

    def __init__(self, order: Order) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # it would remember the prompt from one repeat to the next
        scheduler.max_num_batched_tokens = max(order.context, 256)  # a prompt in one go
        scheduler.cache_size = CACHE_GB
        self.order = order
        self.plain: Any = None  # the model without the pipeline, while logits are asked for
        self.pipeline = openvino_genai.LLMPipeline(
            str(order.weights), "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=order.threads
        )

    def info(self) -> dict[str, Any]:
        """See `Engine.info`."""
        total = (self.order.weights / "openvino_model.bin").stat().st_size
        entries = self.order.options["parameters"]
        per_parameter = total / entries["all"]  # every matrix is compressed alike
        return {
            "version": openvino_genai.__version__,
            "head": self.order.options["head"],
            "bytes": total,
            "step_bytes": round(per_parameter * entries["step"]),
            "settings": {"backend": "continuous batching (paged attention)", "kv_cache": "u8", "dynamic_quantization": "default"},
        }

    def generate(self, tokens: list[int], new_tokens: int) -> Any:
        """Run the pipeline; nothing ends it early."""
        self.plain = None
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        return self.pipeline.generate(openvino.Tensor(np.array([tokens], dtype=np.int64)), config)

    def prefill(self, tokens: list[int]) -> float:
        """See `Engine.prefill`: the pipeline's own time to the first token, which ends with choosing it."""
        return float(self.generate(tokens, 1).perf_metrics.get_ttft().mean) / 1000

    def decode(self, tokens: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        """See `Engine.decode`: differences of the times at which the pipeline had each token."""
        result = self.generate(tokens, new_tokens + 1)
        moments = np.array(result.perf_metrics.raw_metrics.m_new_token_times)
        if len(moments) != new_tokens + 1:
            raise RuntimeError(f"the pipeline gave {len(moments)} tokens, {new_tokens + 1} were asked for.")
        return [float(second) / 1000 for second in np.diff(moments)], list(result.tokens[0])[:new_tokens]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """See `Engine.logits`."""
        if self.plain is None:
            settings = {"INFERENCE_NUM_THREADS": self.order.threads}
            self.plain = openvino.Core().compile_model(str(self.order.weights / "openvino_model.xml"), "CPU", settings)
        count = len(tokens)
        inputs = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = self.plain.create_infer_request().infer({port.any_name: inputs[port.any_name] for port in self.plain.inputs})[
            "logits"
        ]
        return np.array(found[0, -1], dtype=np.float32)


if __name__ == "__main__":
    serve(OpenVino)
