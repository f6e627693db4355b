"""Checkpoints: opened by content, loaded by mapping, written whole and verified."""

from llmq.checkpoint.detect import open_checkpoint
from llmq.checkpoint.inspect import Description, describe
from llmq.checkpoint.load import load_model, load_tokenizer_for
from llmq.checkpoint.manifest import Manifest
from llmq.checkpoint.source import Checkpoint, Format, TensorInfo
from llmq.checkpoint.store import save_model
from llmq.checkpoint.verify import verify

__all__ = [
    "Checkpoint",
    "Description",
    "Format",
    "Manifest",
    "TensorInfo",
    "describe",
    "load_model",
    "load_tokenizer_for",
    "open_checkpoint",
    "save_model",
    "verify",
]
