"""Write a Llama checkpoint of random weights in Hugging Face layout, of any shape, one file of it in memory at a time.

The default shape has 1.1 B parameters: large enough that weights come from memory and not from caches, which is what
benchmarks of speed need; what it says makes no sense. Weights are scaled by their fan-in, so that activations stay finite and
of order one through any number of layers. The same seed and shape give the same bytes.

    python scripts/make_random_checkpoint.py OUT
    python scripts/make_random_checkpoint.py OUT --layers 4 --tokenizer-from MODEL
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch

from llmq.benchmark.traffic import linear_shapes
from llmq.checkpoint.safetensors_file import write_safetensors
from llmq.errors import LlmqError, UsageError
from llmq.files import atomic_path, check_absent
from llmq.model.config import LlamaConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
RESIDUAL_OUTPUTS = ("o_proj", "down_proj")


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored tensor by its name, in the order of the files."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    linears = linear_shapes(config)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{fqn}.weight": shape for fqn, shape in linears.items() if fqn.startswith(prefix)}
        shapes |= {f"{prefix}{norm}.weight": (config.hidden_size,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = linears["lm_head"]
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], config: LlamaConfig, *, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return one tensor; it depends on its name and the seed, and not on what was made before it."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    numbers = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return numbers.mul_(0.1).add_(1.0).to(dtype)  # a norm's weight
    # the embedding of a tied model is its head too, and a head needs the scale of a linear
    scale = 1.0 if name.startswith("model.embed_tokens") and not config.tie_word_embeddings else shape[1] ** -0.5
    if any(part in name for part in RESIDUAL_OUTPUTS):
        scale *= (2 * config.num_layers) ** -0.5
    return numbers.mul_(scale).to(dtype)


def shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit_bytes: int) -> list[list[str]]:
    """Cut the tensors into files of at most `limit_bytes`; a tensor larger than that is a file of its own."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * itemsize
        if files[-1] and filled + nbytes > limit_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += nbytes
    return files


def write_checkpoint(folder: Path, config: LlamaConfig, *, dtype: str, seed: int, shard_bytes: int) -> int:
    """Write config.json and the weights into `folder`; returns the number of parameters."""
    torch_dtype = DTYPES[dtype]
    shapes = tensor_shapes(config)
    files = shards(shapes, torch_dtype.itemsize, shard_bytes)
    names = [f"model-{index + 1:05d}-of-{len(files):05d}.safetensors" for index in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, members in zip(names, files, strict=True):
        made = {member: random_tensor(member, shapes[member], config, dtype=torch_dtype, seed=seed) for member in members}
        write_safetensors(folder / name, made)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    if len(files) > 1:
        weight_map = {member: name for name, members in zip(names, files, strict=True) for member in members}
        index = {"metadata": {"total_size": parameters * torch_dtype.itemsize}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(
        json.dumps(config.to_hf() | {"torch_dtype": str(torch_dtype).removeprefix("torch.")}, indent=2) + "\n"
    )
    return parameters


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files out of another checkpoint's folder."""
    present = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not present:
        raise UsageError(f"{source} holds no tokenizer; name a folder with one of {', '.join(TOKENIZER_FILES)}.")
    for path in present:
        shutil.copyfile(path, folder / path.name)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Write a Llama checkpoint of random weights.")
    parser.add_argument("out", type=Path, help="folder to write")
    for flag, default, what in (
        ("--vocab-size", 32000, "entries of the vocabulary"),
        ("--hidden-size", 2048, "width of the model"),
        ("--intermediate-size", 5632, "width inside the MLP"),
        ("--layers", 22, "number of layers"),
        ("--heads", 32, "query heads"),
        ("--kv-heads", 4, "key and value heads"),
        ("--context", 2048, "longest sequence"),
        ("--seed", 0, "seed of the weights"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--head-dim", type=int, help="width of a head (default: hidden size / heads)")
    parser.add_argument("--tied", action="store_true", help="the head shares the embedding's weight")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the stored weights (default: bf16)")
    parser.add_argument("--shard-mb", type=int, default=256, help="MB a file at most, and in memory (default: 256)")
    parser.add_argument("--tokenizer-from", type=Path, help="copy the tokenizer out of this checkpoint's folder")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    return parser.parse_args(argv)


def make(options: argparse.Namespace) -> str:
    """Write what was asked for; returns what to tell the user."""
    if options.heads < 1 or (options.head_dim is None and options.hidden_size % options.heads):
        raise UsageError(
            f"{options.hidden_size} cannot be shared among {options.heads} heads; choose other numbers or --head-dim."
        )
    if options.shard_mb < 1:
        raise UsageError(f"--shard-mb must be at least 1, got {options.shard_mb}.")
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim or options.hidden_size // options.heads,
        max_position_embeddings=options.context,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=options.tied,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    check_absent(options.out, force=options.force)
    with atomic_path(options.out, force=options.force) as folder:
        folder.mkdir()
        if options.tokenizer_from is not None:
            copy_tokenizer(options.tokenizer_from, folder)
        parameters = write_checkpoint(
            folder, config, dtype=options.dtype, seed=options.seed, shard_bytes=options.shard_mb * 10**6
        )
    return f"{options.out}: {parameters:,} random parameters in {options.dtype}"


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    try:
        print(make(arguments(argv)))
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
