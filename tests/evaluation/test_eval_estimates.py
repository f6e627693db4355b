from __future__ import annotations

import math

import pytest
import torch

from llmq.evaluation.estimates import batch_means, batch_sums, naive_stderr, ratio_estimate


def test_batch_sums_follow_the_sizes() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert batch_sums(values, torch.tensor([1, 3, 2], dtype=torch.int32)).tolist() == [1.0, 14.0, 48.0]


def test_sums_do_not_lose_small_losses_beside_many() -> None:
    values = torch.full((200_000,), 4.1, dtype=torch.float32)  # summed in fp32 one after another this drifts
    exact = 200_000 * float(values[0])
    assert float(batch_sums(values, torch.tensor([200_000]))[0]) == pytest.approx(exact, rel=1e-12)


def test_equal_batches_give_the_textbook_error_of_their_means() -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    means = values.view(6, 10).mean(1)
    estimate = batch_means(values, torch.full((6,), 10))
    assert estimate.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert estimate.stderr == pytest.approx(float(means.std()) / math.sqrt(6), rel=1e-12)


def test_unequal_batches_weigh_by_their_tokens() -> None:
    estimate = ratio_estimate(torch.tensor([2.0, 9.0]), torch.tensor([1, 3]))
    assert estimate.value == pytest.approx(11 / 4)
    # residuals 2 - 11/4 and 9 - 33/4, in n/(n-1) = 2, over the total of 4
    assert estimate.stderr == pytest.approx(math.sqrt(2 * (0.75**2 + 0.75**2)) / 4)


def test_one_batch_has_no_error() -> None:
    assert batch_means(torch.ones(5), torch.tensor([5])).stderr is None
    assert naive_stderr(torch.ones(1)) is None


def test_batch_means_see_correlation_that_the_naive_error_does_not() -> None:
    generator = torch.Generator().manual_seed(1)
    means, naive, batched = [], [], []
    for _ in range(200):  # every batch of 50 tokens shares a difficulty
        values = (torch.randn(20, 1, generator=generator) + torch.randn(20, 50, generator=generator)).flatten()
        estimate = batch_means(values, torch.full((20,), 50))
        means.append(estimate.value)
        batched.append(estimate.stderr or 0.0)
        naive.append(naive_stderr(values) or 0.0)
    truth = float(torch.tensor(means).std())
    assert float(torch.tensor(batched).mean()) == pytest.approx(truth, rel=0.15)
    assert float(torch.tensor(naive).mean()) < truth / 3
