from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq.errors import InputError, OutputError, UsageError
from llmq.evaluation.losses import TokenLosses, load_losses, paired_difference, save_losses
from llmq.results.record import Protocol


@pytest.fixture
def losses() -> TokenLosses:
    generator = torch.Generator().manual_seed(0)
    return TokenLosses(
        nll=torch.rand(40, generator=generator) * 5,
        window_sizes=torch.full((4,), 10, dtype=torch.int32),
        protocol=Protocol(name="windows", version=1, params={"length": 11, "limit": None}),
        text="essay",
        text_sha256="a" * 64,
        tokenizer_sha256="b" * 64,
        dtype="bfloat16",
        subject="model, int4",
    )


def test_they_come_back_bit_for_bit(losses: TokenLosses, tmp_path: Path) -> None:
    path = tmp_path / "losses.safetensors"
    save_losses(losses, path)
    again = load_losses(path)
    assert torch.equal(again.nll, losses.nll)
    assert torch.equal(again.window_sizes, losses.window_sizes)
    assert replace(again, nll=losses.nll, window_sizes=losses.window_sizes).__dict__ == losses.__dict__
    assert paired_difference(again, losses).identical


def test_the_same_losses_make_the_same_bytes(losses: TokenLosses, tmp_path: Path) -> None:
    save_losses(losses, tmp_path / "a")
    save_losses(losses, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_overwritten_unasked(losses: TokenLosses, tmp_path: Path) -> None:
    path = tmp_path / "losses.safetensors"
    save_losses(losses, path)
    with pytest.raises(OutputError, match="exists already"):
        save_losses(losses, path)
    save_losses(replace(losses, nll=losses.nll + 1), path, force=True)
    assert torch.equal(load_losses(path).nll, losses.nll + 1)


def test_a_paired_difference(losses: TokenLosses) -> None:
    shift = torch.tensor([0.1, 0.1, 0.1, 0.3]).repeat_interleave(10)
    other = replace(losses, nll=losses.nll + shift, dtype="float32", subject="another")
    found = paired_difference(losses, other)
    assert not found.identical
    assert found.n_tokens == 40
    assert found.delta_ln_perplexity.value == pytest.approx(0.15, abs=1e-6)
    assert found.delta_ln_perplexity.stderr == pytest.approx(0.05, abs=1e-6)  # std of (0.1, 0.1, 0.1, 0.3) over 2
    back = paired_difference(other, losses)
    assert back.delta_ln_perplexity.value == pytest.approx(-0.15, abs=1e-6)


def test_identical_is_exact(losses: TokenLosses) -> None:
    found = paired_difference(losses, replace(losses, nll=losses.nll.clone()))
    assert found.identical
    assert found.delta_ln_perplexity.value == 0
    assert found.delta_ln_perplexity.stderr == 0
    nudged = losses.nll.clone()
    nudged[7] = torch.nextafter(nudged[7], torch.tensor(torch.inf))
    assert not paired_difference(losses, replace(losses, nll=nudged)).identical


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"protocol": Protocol(name="llamacpp", version=1, params={"length": 11, "limit": None})},
            "protocol is 'windows' in one and 'llamacpp'",
        ),
        (
            {"protocol": Protocol(name="windows", version=2, params={"length": 11, "limit": None})},
            "protocol version is 1 in one and 2",
        ),
        (
            {"protocol": Protocol(name="windows", version=1, params={"length": 11, "limit": 4})},
            "protocol parameter 'limit' is None in one and 4",
        ),
        (
            {"protocol": Protocol(name="windows", version=1, params={"limit": None})},
            "protocol parameter 'length' is 11 in one and None",
        ),
        ({"text_sha256": "f" * 64}, "text_sha256 is 'aaa"),
        ({"tokenizer_sha256": "f" * 64}, "tokenizer_sha256 is 'bbb"),
        ({"nll": torch.zeros(39)}, "scored tokens is 40 in one and 39"),
        ({"window_sizes": torch.tensor([20, 20], dtype=torch.int32)}, "their windows hold different numbers of tokens"),
    ],
)
def test_what_is_not_alike_is_refused_by_name(losses: TokenLosses, change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        paired_difference(losses, replace(losses, **change))


def test_a_file_that_is_none_says_so(losses: TokenLosses, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_losses(tmp_path / "nowhere")
    weights = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(2)}, weights)
    with pytest.raises(InputError, match="holds no per-token losses"):
        load_losses(weights)
    path = tmp_path / "losses"
    save_losses(losses, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="is damaged"):
        load_losses(path)
    path.write_text("not a tensor file")
    with pytest.raises(InputError, match="is damaged"):
        load_losses(path)


def test_a_newer_version_is_refused(losses: TokenLosses, tmp_path: Path) -> None:
    path = tmp_path / "losses"
    save_losses(losses, path)
    path.write_bytes(path.read_bytes().replace(rb"\"version\": 1}", rb"\"version\": 9}"))
    with pytest.raises(InputError, match="has version 9 of the losses format, this llmq reads 1"):
        load_losses(path)


def test_sizes_that_do_not_add_up_are_damage(losses: TokenLosses, tmp_path: Path) -> None:
    path = tmp_path / "losses"
    save_losses(replace(losses, nll=losses.nll[:39]), path)
    with pytest.raises(InputError, match="39 losses for windows of 40 tokens"):
        load_losses(path)
