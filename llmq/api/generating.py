"""Completing a prompt."""

from __future__ import annotations

from collections.abc import Iterator

from llmq.api.loading import Setup, open_model
from llmq.api.recipes import Recipe
from llmq.model.generate import Sampling, generate
from llmq.model.tokenizer import StreamDecoder
from llmq.progress import SILENT, Progress


def complete(
    path: str,
    prompt: str,
    recipe: Recipe | None = None,
    setup: Setup | None = None,
    sampling: tuple[int, float, int | None] = (64, 0.0, None),
    *,
    progress: Progress = SILENT,
) -> Iterator[str]:
    """Complete `prompt` with a checkpoint.

    Args:
        path: the checkpoint.
        prompt: UTF-8 text; BOS is put before it where the tokenizer has one.
        recipe: a scheme to apply first; None: the checkpoint as it is.
        setup: where and how it runs.
        sampling: (most new tokens, temperature, top-k or None).
        progress: is told how far loading and quantizing are.

    Returns:
        The new text, piece by piece as it comes. The model is loaded, and everything checked, before it is returned.
    """
    setup = setup or Setup()
    loaded = open_model(path, recipe, setup, progress=progress)
    tokenizer = loaded.tokenizer
    most, temperature, top_k = sampling
    prompt_tokens = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    # some formats (llama2.c, Meta) do not say where a text ends; their tokenizer does
    ends = loaded.model.config.eos_token_ids or tuple(token for token in (tokenizer.eos_id,) if token is not None)
    tokens = generate(
        loaded.runner,
        prompt_tokens,
        stop=ends,
        max_new_tokens=most,
        sampling=Sampling(temperature, top_k, seed=setup.seed),
        kv_dtype=loaded.kv_dtype,
    )

    def pieces() -> Iterator[str]:
        decoder = StreamDecoder(tokenizer)
        for token in prompt_tokens:  # what a token's text is depends on the one before it
            decoder.push(token)
        for token in tokens:
            yield decoder.push(token)
        yield decoder.flush()

    return pieces()
