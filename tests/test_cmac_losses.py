"""Eqs. (1), (2), (6), (7) and (8): hand-worked cases and an independent float64 computation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmac.losses import (
    LossConfig,
    attention_consistency_loss,
    contrastive_loss,
    noise_contrastive_loss,
    total_loss,
)


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def equation_7(query, key, cross, within, temperature, cross_excluded, within_excluded) -> np.ndarray:
    """Eq. (7) written out in float64 numpy, term by term."""
    losses = []
    for n in range(len(query)):
        positive = math.exp(float(np.dot(query[n], key[n])) / temperature)
        total = positive
        for keys, excluded in ((cross, cross_excluded), (within, within_excluded)):
            if keys is None:
                continue
            for m in range(len(keys)):
                if excluded is None or not excluded[n, m]:
                    total += math.exp(float(np.dot(query[n], keys[m])) / temperature)
        losses.append(-math.log(positive / total))
    return np.array(losses)


def test_plain_contrastive_loss_of_a_hand_worked_case():
    # Two clips whose audio and video agree, and are orthogonal to the other's: -log(e / (e + 1)).
    v = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    a = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    expected = -math.log(math.e / (math.e + 1))
    assert noise_contrastive_loss(v, a, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # Crossed partners: the positive is the orthogonal one.
    assert noise_contrastive_loss(v, a.flip(0), 1.0).item() == pytest.approx(
        -math.log(1 / (math.e + 1)), rel=1e-6
    )


@pytest.mark.parametrize(("num_clips", "dim"), [(1, 3), (7, 5), (16, 32)])
def test_plain_contrastive_loss_matches_float64(num_clips, dim):
    v, a = unit(num_clips, dim, seed=0), unit(num_clips, dim, seed=1)
    losses = []
    for n in range(num_clips):
        terms = [math.exp(float(v[n] @ a[m]) / 0.07) for m in range(num_clips)]
        losses.append(-math.log(terms[n] / sum(terms)))
    got = noise_contrastive_loss(v.float(), a.float(), 0.07)
    assert got.item() == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-5)


def test_remoulded_contrastive_loss_of_a_hand_worked_case():
    query = torch.tensor([[1.0, 0.0]])
    key = torch.tensor([[1.0, 0.0]])
    cross = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    within = torch.tensor([[0.6, 0.8]])
    # tau = 1: positive e, cross negatives 1 and 1/e, within negative e^0.6.
    got = contrastive_loss(query, key, cross, within, 1.0)
    total = math.e + 1 + math.exp(-1) + math.exp(0.6)
    assert got.loss.item() == pytest.approx(-math.log(math.e / total), rel=1e-6)
    assert got.correct.tolist() == [True]
    without = contrastive_loss(query, key, cross, None, 1.0)
    assert without.loss.item() == pytest.approx(-math.log(math.e / (math.e + 1 + math.exp(-1))), rel=1e-6)


@pytest.mark.parametrize(("num_clips", "num_keys", "num_within"), [(1, 1, 1), (3, 17, 5), (8, 64, 31)])
def test_remoulded_contrastive_loss_and_gradient_match_float64(num_clips, num_keys, num_within):
    query, key = unit(num_clips, 12, seed=2), unit(num_clips, 12, seed=3)
    cross, within = unit(num_keys, 12, seed=4), unit(num_within, 12, seed=5)
    generator = torch.Generator().manual_seed(6)
    cross_excluded = torch.rand(num_clips, num_keys, generator=generator) < 0.3
    within_excluded = torch.rand(num_clips, num_within, generator=generator) < 0.3
    expected = equation_7(
        query.numpy(), key.numpy(), cross.numpy(), within.numpy(), 0.07, cross_excluded, within_excluded
    )
    leaf = query.float().requires_grad_()
    got = contrastive_loss(
        leaf, key.float(), cross.float(), within.float(), 0.07,
        cross_excluded=cross_excluded, within_excluded=within_excluded,
    )  # fmt: skip
    np.testing.assert_allclose(got.loss.detach().numpy(), expected, rtol=1e-4, atol=1e-5)

    # Gradient of the loss by the softmax form (sum_j p_j k_j - k) / tau, in float64.
    got.loss.sum().backward()
    keys = torch.cat([cross, within])
    similarity = query @ keys.T / 0.07
    similarity = similarity.masked_fill(torch.cat([cross_excluded, within_excluded], 1), float("-inf"))
    positive = (query * key).sum(1, keepdim=True) / 0.07
    weights = torch.cat([positive, similarity], 1).softmax(1)
    gradient = (weights[:, :1] * key + weights[:, 1:] @ keys - key) / 0.07
    np.testing.assert_allclose(leaf.grad.numpy(), gradient.numpy(), rtol=1e-3, atol=1e-4)


def test_excluded_negatives_do_not_count_and_all_excluded_is_zero():
    query, key = unit(4, 8, seed=7).float(), unit(4, 8, seed=8).float()
    cross = unit(6, 8, seed=9).float()
    excluded = torch.zeros(4, 6, dtype=torch.bool)
    excluded[:, 3:] = True
    few = contrastive_loss(query, key, cross[:3], None, 0.07)
    masked = contrastive_loss(query, key, cross, None, 0.07, cross_excluded=excluded)
    torch.testing.assert_close(masked.loss, few.loss)
    leaf = query.clone().requires_grad_()
    nothing = contrastive_loss(
        leaf, key, cross, None, 0.07, cross_excluded=torch.ones(4, 6, dtype=torch.bool)
    )
    nothing.loss.sum().backward()
    assert torch.equal(nothing.loss, torch.zeros(4)) and torch.isfinite(leaf.grad).all()


def test_half_precision_autocast_leaves_the_losses_alone():
    query, key, cross = unit(6, 32, seed=1).float(), unit(6, 32, seed=2).float(), unit(40, 32, seed=3).float()
    expected = contrastive_loss(query, key, cross, cross, 0.07).loss
    plain = noise_contrastive_loss(query, key, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (query @ cross.T).dtype == torch.bfloat16
        assert torch.equal(contrastive_loss(query, key, cross, cross, 0.07).loss, expected)
        assert torch.equal(noise_contrastive_loss(query, key, 0.07), plain)


def test_accuracy_compares_the_positive_with_the_best_negative():
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cross = torch.tensor([[0.8, 0.6]])
    assert contrastive_loss(query, key, cross, None, 0.07).correct.tolist() == [True, False]


def test_permuting_a_batch_permutes_the_losses():
    query, key, cross = unit(5, 8, seed=1).float(), unit(5, 8, seed=2).float(), unit(9, 8, seed=3).float()
    order = torch.tensor([3, 1, 4, 0, 2])
    loss = contrastive_loss(query, key, cross, cross, 0.07).loss
    permuted = contrastive_loss(query[order], key[order], cross, cross, 0.07).loss
    torch.testing.assert_close(permuted, loss[order])


def test_consistency_is_the_squared_distance_of_the_maps():
    guided = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 0.0], [0.0, 0.0]]])
    predicted = torch.tensor([[[0.0, 0.0], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.5]]])
    torch.testing.assert_close(attention_consistency_loss(guided, predicted), torch.tensor([1.25, 0.25]))
    torch.testing.assert_close(
        attention_consistency_loss(guided, predicted, "mean"), torch.tensor([1.25, 0.25]) / 4
    )


def test_total_is_contrastive_plus_lambda_times_consistency():
    assert total_loss(torch.tensor(2.0), torch.tensor(0.5), 1.5).item() == 2.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"consistency_weight": -1.0}, "consistency_weight is -1.0"),
        ({"contrastive": False, "consistency_weight": 0.0}, "nothing is left to train"),
        ({"contrastive": False, "positives": "both"}, "without loss.contrastive"),
        ({"positives": "within"}, "set loss.consistency_weight to 0"),
    ],
)
def test_losses_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)
