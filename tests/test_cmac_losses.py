"""Eqs. (1), (2), (6), (7) and (8): hand-worked cases and an independent float64 computation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmac.losses import (
    LossConfig,
    Negatives,
    attention_consistency_loss,
    contrastive_loss,
    noise_contrastive_loss,
    total_loss,
)
from cmac.queue import EMPTY


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def bank(keys: torch.Tensor, video_ids: torch.Tensor | None = None) -> Negatives:
    """Keys of strangers, unless ids are given."""
    return Negatives(keys, 1000 + torch.arange(len(keys)) if video_ids is None else video_ids)


def ids(count: int) -> torch.Tensor:
    return torch.arange(count)


def equation_7(query, key, video_ids, negatives, temperature) -> np.ndarray:
    """Eq. (7) written out in float64, term by term."""
    losses = []
    for n in range(len(query)):
        positive = math.exp(float(np.dot(query[n], key[n])) / temperature)
        total = positive
        for keys, key_ids in negatives:
            for m in range(len(keys)):
                if key_ids[m] not in (EMPTY, video_ids[n]):
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
    got = contrastive_loss(query, key, ids(1), [bank(cross), bank(within)], 1.0)
    total = math.e + 1 + math.exp(-1) + math.exp(0.6)
    assert got.loss.item() == pytest.approx(-math.log(math.e / total), rel=1e-6)
    assert got.correct.tolist() == [True]
    without = contrastive_loss(query, key, ids(1), [bank(cross)], 1.0)
    assert without.loss.item() == pytest.approx(-math.log(math.e / (math.e + 1 + math.exp(-1))), rel=1e-6)


@pytest.mark.parametrize(("num_clips", "num_keys", "num_within"), [(1, 1, 1), (3, 17, 5), (8, 64, 31)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_remoulded_contrastive_loss_and_gradient_match_float64(
    num_clips, num_keys, num_within, dtype, tolerance
):
    query, key = unit(num_clips, 12, seed=2), unit(num_clips, 12, seed=3)
    cross, within = unit(num_keys, 12, seed=4), unit(num_within, 12, seed=5)
    generator = torch.Generator().manual_seed(6)
    video_ids = torch.randint(0, 5, (num_clips,), generator=generator)
    cross_ids, within_ids = (
        torch.randint(EMPTY, 5, (count,), generator=generator) for count in (num_keys, num_within)
    )
    pairs = [(cross.numpy(), cross_ids.tolist()), (within.numpy(), within_ids.tolist())]
    expected = equation_7(query.numpy(), key.numpy(), video_ids.tolist(), pairs, 0.07)
    leaf = query.to(dtype, copy=True).requires_grad_()
    banks = [Negatives(cross.to(dtype), cross_ids), Negatives(within.to(dtype), within_ids)]
    got = contrastive_loss(leaf, key.to(dtype), video_ids, banks, 0.07)
    assert got.loss.dtype == dtype and got.correct.dtype == torch.bool
    np.testing.assert_allclose(got.loss.detach().numpy(), expected, rtol=tolerance, atol=tolerance / 10)

    # Gradient of the loss by the softmax form (sum_j p_j k_j - k) / tau, in float64.
    got.loss.sum().backward()
    keys, key_ids = torch.cat([cross, within]), torch.cat([cross_ids, within_ids])
    excluded = (key_ids == EMPTY) | (key_ids == video_ids[:, None])
    similarity = (query @ keys.T / 0.07).masked_fill(excluded, float("-inf"))
    positive = (query * key).sum(1, keepdim=True) / 0.07
    weights = torch.cat([positive, similarity], 1).softmax(1)
    gradient = (weights[:, :1] * key + weights[:, 1:] @ keys - key) / 0.07
    np.testing.assert_allclose(leaf.grad.numpy(), gradient.numpy(), rtol=10 * tolerance, atol=tolerance)


def test_clips_of_the_own_video_and_empty_slots_are_no_negatives():
    query, key = unit(4, 8, seed=7).float(), unit(4, 8, seed=8).float()
    cross = unit(6, 8, seed=9).float()
    few = contrastive_loss(query, key, ids(4), [bank(cross[:3])], 0.07)
    empty = torch.tensor([10, 11, 12, EMPTY, EMPTY, EMPTY])
    torch.testing.assert_close(contrastive_loss(query, key, ids(4), [bank(cross, empty)], 0.07), few)
    own = contrastive_loss(query, key, ids(4), [bank(cross, torch.tensor([10, 11, 12, 2, 2, 2]))], 0.07)
    torch.testing.assert_close(own.loss[2], few.loss[2])
    assert (own.loss > few.loss).tolist() == [True, True, False, True]
    leaf = query.clone().requires_grad_()
    nothing = contrastive_loss(leaf, key, ids(4), [bank(cross, torch.full((6,), EMPTY))], 0.07)
    nothing.loss.sum().backward()
    assert torch.equal(nothing.loss, torch.zeros(4)) and nothing.correct.all()
    torch.testing.assert_close(leaf.grad, torch.zeros(4, 8), atol=1e-6, rtol=0)


def test_whatever_lies_in_an_empty_slot_stays_out_of_loss_and_gradient():
    query, key, cross = unit(3, 8, seed=1).float(), unit(3, 8, seed=2).float(), unit(5, 8, seed=3).float()
    cross[1], cross[4] = float("nan"), float("inf")
    leaf = query.clone().requires_grad_()
    slots = torch.tensor([10, EMPTY, 12, 13, EMPTY])
    got = contrastive_loss(leaf, key, ids(3), [bank(cross, slots)], 0.07)
    got.loss.sum().backward()
    expected = contrastive_loss(query, key, ids(3), [bank(cross[[0, 2, 3]])], 0.07)
    torch.testing.assert_close(got.loss, expected.loss)
    assert torch.isfinite(leaf.grad).all()


def test_only_queries_get_a_gradient():
    tensors = [unit(count, 8, seed=count).float().requires_grad_() for count in (4, 4, 6)]
    query, key, cross = tensors
    contrastive_loss(query, key, ids(4), [bank(cross)], 0.07).loss.sum().backward()
    assert query.grad is not None and key.grad is None and cross.grad is None


def test_half_precision_autocast_leaves_the_losses_alone():
    query, key, cross = unit(6, 32, seed=1).float(), unit(6, 32, seed=2).float(), unit(40, 32, seed=3).float()
    banks = [bank(cross), bank(cross)]
    expected = contrastive_loss(query, key, ids(6), banks, 0.07).loss
    plain = noise_contrastive_loss(query, key, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (query @ cross.T).dtype == torch.bfloat16
        assert torch.equal(contrastive_loss(query, key, ids(6), banks, 0.07).loss, expected)
        assert torch.equal(noise_contrastive_loss(query, key, 0.07), plain)


def test_half_precision_tensors_are_compared_in_float32():
    query, key, cross = unit(6, 32, seed=1), unit(6, 32, seed=2), unit(40, 32, seed=3)
    half = [tensor.to(torch.bfloat16) for tensor in (query, key, cross)]
    got = contrastive_loss(half[0], half[1], ids(6), [bank(half[2])], 0.07).loss
    exact = [tensor.double() for tensor in half]
    expected = contrastive_loss(exact[0], exact[1], ids(6), [bank(exact[2])], 0.07).loss
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_accuracy_compares_the_positive_with_the_best_negative():
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cross = torch.tensor([[0.8, 0.6]])
    assert contrastive_loss(query, key, ids(2), [bank(cross)], 0.07).correct.tolist() == [True, False]


def test_permuting_a_batch_permutes_the_losses():
    query, key, cross = unit(5, 8, seed=1).float(), unit(5, 8, seed=2).float(), unit(9, 8, seed=3).float()
    banks = [bank(cross, torch.arange(9) % 6), bank(cross)]
    order = torch.tensor([3, 1, 4, 0, 2])
    loss = contrastive_loss(query, key, ids(5), banks, 0.07).loss
    permuted = contrastive_loss(query[order], key[order], ids(5)[order], banks, 0.07).loss
    torch.testing.assert_close(permuted, loss[order])


def test_both_directions_stacked_equal_one_after_the_other():
    query, key = unit(8, 16, seed=1).float(), unit(8, 16, seed=2).float()
    banks = [bank(unit(9, 16, seed=3).float(), torch.arange(9) % 6), bank(unit(7, 16, seed=4).float())]
    both = contrastive_loss(query, key, ids(4).repeat(2), banks, 0.07)
    for half in (slice(0, 4), slice(4, 8)):
        one = contrastive_loss(query[half], key[half], ids(4), banks, 0.07)
        torch.testing.assert_close(both.loss[half], one.loss)
        assert torch.equal(both.correct[half], one.correct)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"query": torch.zeros(3, dtype=torch.int64)}, r"query is torch.int64 \(3,\), expected floats"),
        ({"key": torch.zeros(2, 8)}, r"key is torch.float32 \(2, 8\), expected floats \(3, 8\)"),
        ({"video_ids": torch.zeros(3)}, r"video_ids is torch.float32 \(3,\), expected torch.int64 \(3,\)"),
        ({"negatives": []}, "holds 0 banks, expected 1 or 2"),
        (
            {"negatives": [bank(torch.zeros(0, 8))]},
            r"negatives\[0\].keys is torch.float32 \(0, 8\), expected",
        ),
        ({"negatives": [bank(torch.zeros(5, 8), ids(4))]}, r"negatives\[0\].video_ids is torch.int64 \(4,\)"),
        ({"negatives": [bank(torch.zeros(5, 8, device="meta"), ids(5))]}, "keys is on meta, expected cpu"),
        ({"impl": "cuda"}, "impl is 'cuda', expected auto or reference or fused"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    arguments = {"query": torch.zeros(3, 8), "key": torch.zeros(3, 8), "video_ids": ids(3)}
    arguments |= {"negatives": [bank(torch.zeros(5, 8))], "temperature": 0.07}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{**arguments, **changes})


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
