"""Train a small Llama on a text and write it as a Hugging Face directory; llmq/assets/wt2-8m is such a model.

    python scripts/train_demo_model.py train.tokens.txt --validation valid.tokens.txt -o my-model

The defaults are the recipe of the bundled checkpoint. Hours on two cores without bf16 arithmetic; a model that learns
something in a minute, to try the script with:

    python scripts/train_demo_model.py llmq/assets/sample/calibration.txt -o tiny --vocab-size 512 --context 64 \
        --hidden-size 64 --intermediate-size 192 --layers 2 --heads 4 --kv-heads 2 --steps 200

Rows that are blank are left out, a BOS goes before each article (a line ' = Title = ' begins one), and the tokens are packed
into windows without padding, cut anew in every pass over the text. The same text, options and threads give the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from statistics import fmean
from typing import Annotated

import sentencepiece
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from llmq.calibration.corpus import TextSource, cut_windows, resolve_text, token_stream
from llmq.checkpoint.safetensors_file import write_safetensors
from llmq.cli.render.console import reporting
from llmq.errors import LlmqError, TextError, UsageError
from llmq.evaluation.protocols import Window
from llmq.evaluation.scoring import Batching, batches, slabs, token_losses
from llmq.files import atomic_path
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama
from llmq.model.tokenizer import load_tokenizer
from llmq.progress import Progress
from llmq.results.environment import cpu_features

VALIDATION_SHARE = 0.05
"""Of the tokens, from the end of the text, where no validation text is named. The tokenizer has seen them, the model not."""
REPORTS = 20
"""How often the losses are reported during a run."""
REPORT_WINDOWS = 32
"""Validation windows of such a report; the loss before and after training is over all of them."""
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
SENTENCE_BYTES = 16384
"""Longest row that SentencePiece learns from; it leaves out longer ones."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained; the defaults made llmq/assets/wt2-8m."""

    vocab_size: int = 4096
    context: int = 256
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    steps: int = 3897
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: float = 0.02  # share of the steps in which the learning rate rises
    weight_decay: float = 0.1
    dropout: float = 0.05
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    bf16: bool = False

    def config(self) -> LlamaConfig:
        """Return the model's configuration; UsageError when the sizes do not go together."""
        if self.hidden_size % self.heads:
            raise UsageError(f"--hidden-size must be a multiple of --heads, got {self.hidden_size} and {self.heads}.")
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            bos_token_id=BOS_ID,
            eos_token_ids=(EOS_ID,),
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a share of `learning_rate`: a linear rise, then a cosine down to 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return (1 + cos(pi * (step - rising) / max(1, self.steps - rising))) / 2


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run came to, in nats/token."""

    training_losses: list[float]  # of every step
    validation_before: float
    validation_after: float


def train_tokenizer(text: TextSource, recipe: Recipe) -> bytes:
    """Return a SentencePiece BPE (arXiv:1808.06226) of `text`: any bytes go in and come out again, newlines too.

    Raises:
        TextError: the text has too few different pieces for the vocabulary, or the vocabulary no room for its characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(row for row in text.lines if row.strip()),
            model_writer=model,
            model_type="bpe",
            vocab_size=recipe.vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            max_sentence_length=SENTENCE_BYTES,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,  # SentencePiece's way to say: none
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or f"every row is longer than {SENTENCE_BYTES} bytes"
        raise TextError(
            f"text {text.name} does not make a tokenizer of {recipe.vocab_size} pieces (SentencePiece: {reason.rstrip('.')}); "
            "give a longer text, or choose another --vocab-size."
        ) from error
    return model.getvalue()


def without_blank_rows(text: TextSource) -> list[str]:
    """Return the articles of a text, each with its rows that are not blank."""
    return ["".join(f"{row}\n" for row in page.split("\n") if row.strip()) for page in text.documents()]


def initialise(model: Llama, layers: int) -> None:
    """Draw the weights: normal with deviation 0.02, and less by sqrt(2 layers) where a branch joins the residual stream."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
            continue
        joins = name.endswith(("o_proj.weight", "down_proj.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if joins else 0.02)


@contextmanager
def with_dropout(model: Llama, p: float) -> Iterator[None]:
    """Drop a share `p` of the embedding's and of each branch's output in training mode; the model itself has no dropout."""

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return F.dropout(output, p, training=module.training)

    branches = [part for block in model.blocks for part in (block.get_submodule("self_attn"), block.get_submodule("mlp"))]
    handles = [module.register_forward_hook(drop) for module in (model.model.embed_tokens, *branches)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def training_batches(stream: Tensor, recipe: Recipe, name: str) -> Iterator[Tensor]:
    """Yield int64 [batch_size, context + 1] without end; each pass over `stream` [T] cuts and orders its windows anew."""
    length = recipe.context + 1  # the last token is a target only
    # one window fewer than there are, so that the passes can begin at different tokens
    n = max(recipe.batch_size, len(stream) // length - 1)
    seed = recipe.seed
    while True:
        windows = cut_windows(stream, n, length, seed=seed, name=name)
        for first in range(0, n - n % recipe.batch_size, recipe.batch_size):
            yield windows[first : first + recipe.batch_size]
        seed += 1


@torch.no_grad()
def mean_loss(model: Llama, windows: Sequence[Window]) -> float:
    """Return the mean loss of `windows` in nats/token, without dropout."""
    model.eval()
    losses = [token_losses(slab) for batch in batches(windows, Batching()) for slab in slabs(model, batch, Batching())]
    model.train()
    return float(torch.cat(losses).double().mean())


def train(
    model: Llama, batch_source: Iterator[Tensor], validation: Sequence[Window], recipe: Recipe, progress: Progress
) -> Trained:
    """Train `model` in place with AdamW (arXiv:1711.05101); weights that are vectors do not decay.

    Raises:
        TextError: the text has fewer windows than one batch.
        UsageError: a gradient is not finite.
    """
    decaying = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decaying, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    before = mean_loss(model, validation)
    progress.note(f"before training: validation loss {before:.3f} nats/token")
    losses: list[float] = []
    every = max(1, recipe.steps // REPORTS)
    with with_dropout(model, recipe.dropout), progress.task("training", total=recipe.steps) as advance:
        for step, batch in zip(range(1, recipe.steps + 1), batch_source, strict=False):
            with torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else nullcontext():
                logits = model(batch[:, :-1])  # [B, T, V]
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            if not bool(torch.isfinite(norm)):
                raise UsageError(
                    f"training diverged at step {step} (gradient norm {float(norm)}); choose a lower --learning-rate."
                )
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            advance(1)
            if step % every == 0 and step < recipe.steps:
                seen = mean_loss(model, validation[:REPORT_WINDOWS])
                progress.note(f"step {step}: training loss {fmean(losses[-every:]):.3f}, validation loss about {seen:.3f}")
    after = mean_loss(model, validation)
    model.eval()
    progress.note(f"after training: validation loss {after:.3f} nats/token over {len(validation)} windows")
    return Trained(losses, before, after)


def write_model(model: Llama, recipe: Recipe, folder: Path) -> None:
    """Write config.json, model.safetensors in bf16 and tokenizer_config.json into a folder."""
    config = recipe.config().to_hf() | {"torch_dtype": "bfloat16"}
    tokenizer: dict[str, object] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    tokenizer |= {"model_max_length": recipe.context, "legacy": True}
    for name, data in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    write_safetensors(folder / "model.safetensors", weights)


def run(
    text: TextSource, validation: TextSource | None, out: Path, recipe: Recipe, *, force: bool, progress: Progress
) -> Trained:
    """Train a tokenizer and a model on `text` and write them to `out`, whole or not at all.

    Raises:
        OutputError: `out` exists and `force` is not set, or it cannot be written.
        TextError: a text is too short for the vocabulary, the context or the batch.
        UsageError: the model's sizes do not go together.
    """
    torch.manual_seed(recipe.seed)
    with atomic_path(out, force=force) as folder:
        model = Llama(recipe.config())
        initialise(model, recipe.layers)
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(train_tokenizer(text, recipe))
        tokenizer = load_tokenizer(folder)
        stream = token_stream(tokenizer, without_blank_rows(text))
        if validation is None:
            kept = len(stream) - max(round(VALIDATION_SHARE * len(stream)), recipe.context + 1)
            stream, held_out, held_out_name = stream[: max(kept, 0)], stream[max(kept, 0) :], f"{text.name} (its end)"
        else:
            held_out, held_out_name = token_stream(tokenizer, without_blank_rows(validation)), validation.name
        length = recipe.context + 1
        windows = cut_windows(held_out, max(1, len(held_out) // length), length, seed=None, name=held_out_name)
        source = training_batches(stream, recipe, text.name)
        parameters, trained = sum(parameter.numel() for parameter in model.parameters()), recipe.steps * recipe.batch_size
        progress.note(
            f"{parameters / 1e6:.2f} M parameters; {len(stream):,} tokens, of which {trained * recipe.context:,} will be seen "
            f"({trained * length / len(stream):.1f} passes)"
        )
        result = train(model, source, [Window(row[:-1], row[1:], 0) for row in windows], recipe, progress)
        write_model(model, recipe, folder)
    return result


DEFAULT = Recipe()
Count = Annotated[int, typer.Option(min=1)]


def main(  # noqa: PLR0913, PLR0917 - a command's options are its parameters
    text: Annotated[Path, typer.Argument(help="UTF-8 text to train on, such as WikiText-2's wiki.train.tokens.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    validation: Annotated[
        Path | None, typer.Option(help="Text for the validation loss; without it, the last 5 % of TEXT.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    vocab_size: Count = DEFAULT.vocab_size,
    context: Count = DEFAULT.context,
    hidden_size: Count = DEFAULT.hidden_size,
    intermediate_size: Count = DEFAULT.intermediate_size,
    layers: Count = DEFAULT.layers,
    heads: Count = DEFAULT.heads,
    kv_heads: Count = DEFAULT.kv_heads,
    steps: Count = DEFAULT.steps,
    batch_size: Count = DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(min=0, max=1)] = DEFAULT.learning_rate,
    dropout: Annotated[float, typer.Option(min=0, max=0.9)] = DEFAULT.dropout,
    seed: Annotated[int, typer.Option(min=0)] = DEFAULT.seed,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; without it, torch's choice.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bf16 where torch's autocast does.")] = DEFAULT.bf16,
) -> None:
    """Train a small Llama and its tokenizer on TEXT and write a Hugging Face directory."""
    recipe = Recipe(
        vocab_size=vocab_size,
        context=context,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        seed=seed,
        bf16=bf16,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with reporting() as progress:
            if bf16 and not {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_features()):
                progress.note("this CPU has no bf16 arithmetic, so --bf16 will be slower than fp32")
            held_out = resolve_text(validation, split="validation") if validation is not None else None
            run(resolve_text(text, split="train"), held_out, out, recipe, force=force, progress=progress)
    except LlmqError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
