"""What every row of a suite reads: calibration windows, evaluation text, llama.cpp's importance matrix; each made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.calibration.corpus import TextSource, resolve_text
from llmq.calibration.recorder import CalibrationSet, InputRecorder
from llmq.checkpoint import load_model, load_tokenizer_for
from llmq.checkpoint.source import Checkpoint
from llmq.evaluation.protocols import prefix_token
from llmq.files import atomic_path
from llmq.model.generate import Sampling, decode_step, prefill, sample
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.tokenizer import Tokenizer, find_tokenizer
from quality.catalogue import Suite

LENGTH = 256
"""Tokens of a calibration window."""
STORY_TOKENS, STORY_BATCH = 384, 64
OWN_TEXTS = {"train": (1000, 192), "test": (2000, 384)}
"""Seed and number of the stories that a model writes for calibration, and for evaluation."""


@dataclass
class Corpus:
    """The files of one suite, in a folder that the checkpoint's hash names; what is there is used again."""

    suite: Suite
    checkpoint: Checkpoint
    folder: Path
    say: Callable[[str], None]
    tokenizer: Tokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer_for(self.checkpoint)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder or file."""
        return Path(self.checkpoint.path).resolve().name

    def text(self, split: str) -> TextSource:
        """Return the text of a split: 'train' for calibration, 'test' for evaluation."""
        if self.suite.text == "wikitext":
            return resolve_text(None, split="train" if split == "train" else "test")
        path = self.folder / f"own-{split}.txt"
        if not path.exists():
            seed, count = OWN_TEXTS[split]
            self.say(f"letting {self.name} write {count} stories for {split} with seed {seed}")
            with atomic_path(path) as temporary:
                temporary.write_text("\n".join(write_stories(load_model(self.checkpoint), self.tokenizer, count, seed)) + "\n")
        return resolve_text(path, split="test")

    def windows(self, count: int) -> Path | None:
        """Return the file of `count` calibration windows; None for 0."""
        if count == 0:
            return None
        path = self.folder / f"windows-{count}-seed{self.suite.seed}.safetensors"
        if not path.exists():
            recorder = InputRecorder(self.tokenizer, windows=count, length=LENGTH, seed=self.suite.seed)
            recorder.record_text(self.text("train")).save(path)
        return path

    def hugging_face(self) -> Path:
        """Return a folder with the original in Hugging Face layout, writing it when the checkpoint has another."""
        if self.checkpoint.format == "hf":
            return Path(self.checkpoint.path).resolve()
        path = self.folder / "hugging-face"
        if not path.exists():
            model = load_model(self.checkpoint)
            with atomic_path(path) as temporary:
                write_hugging_face(model, self.checkpoint, temporary)
        return path

    def imatrix(self, count: int) -> Path:
        """Return the file of the mean squares of every matrix's inputs over `count` windows."""
        path = self.folder / f"imatrix-{count}-seed{self.suite.seed}.npz"
        if not path.exists():
            windows = self.windows(count)
            assert windows is not None
            tokens = CalibrationSet.load(windows, tokenizer=self.tokenizer).tokens.long()
            means = mean_squares(load_model(self.checkpoint, dtype=torch.float32), tokens)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **{f"{name}.weight": mean.numpy() for name, mean in means.items()})
        return path


@torch.no_grad()
def write_stories(model: Llama, tokenizer: Tokenizer, count: int, seed: int) -> list[str]:
    """Let a model write `count` texts after BOS at temperature 1, each until its end or `STORY_TOKENS` tokens, a line each."""
    config = model.config
    start, _ = prefix_token(tokenizer)  # a checkpoint of llama2.c names none in its configuration
    length = min(STORY_TOKENS, config.max_position_embeddings)
    ends = {start, tokenizer.eos_id, *config.eos_token_ids}
    generator = torch.Generator().manual_seed(seed)
    stories: list[str] = []
    while len(stories) < count:
        cache = KVCache(config, STORY_BATCH, length, model.dtype, model.device)
        tokens = [torch.full((STORY_BATCH, 1), start)]
        logits = prefill(model, cache, tokens[0])
        for position in range(1, length):
            tokens.append(sample(logits[:, -1], Sampling(temperature=1.0), generator))
            if position + 1 < length:
                logits = decode_step(model, cache, tokens[-1], position)
        for row in torch.cat(tokens[1:], dim=1).tolist():
            end = next((index for index, token in enumerate(row) if token in ends), len(row))
            stories.append(" ".join(tokenizer.decode(row[:end]).split()))
    return [story for story in stories[:count] if story]


@torch.no_grad()
def mean_squares(model: Llama, tokens: Tensor) -> dict[str, Tensor]:
    """Return the mean square of each input of every linear of the blocks, float32 [K], by the linear's name.

    Args:
        model: the original.
        tokens: int64 [windows, length].
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def add(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        return add

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears if name.startswith("model.layers.")]
    for batch in torch.split(tokens, 8):
        model.hidden(batch)
    for handle in handles:
        handle.remove()
    return {name: (total / tokens.numel()).float() for name, total in sums.items()}


def write_hugging_face(model: Llama, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a model's weights, its shape and its tokenizer as Hugging Face has them."""
    import json

    config = model.config
    folder.mkdir()
    head_tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items() if name not in head_tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(shape, indent=1))
    tokenizer = find_tokenizer(checkpoint.folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / tokenizer.name)
