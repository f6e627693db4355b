"""llmq: which quantization of a Llama checkpoint to ship, and what it costs."""

__version__ = "0.1.0"
