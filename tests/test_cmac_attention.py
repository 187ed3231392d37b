"""Eqs. (3)-(5): hand-worked cases and properties of filters and attention maps."""

import math

import pytest
import torch
import torch.nn.functional as F

from cmac.attention import (
    AttentionConfig,
    CorrelationTransform,
    SaliencyHead,
    guided_attention,
    pool_filter,
    predicted_attention,
)
from cmac.norm import build_norm_layers

NORM_2D, NORM_3D = build_norm_layers(None)
SIZES = [(4, 8, 8), (9, 4), (1, 1), (1, 1, 1), (1, 3, 5), (17, 7)]


def test_filter_is_the_mean_over_positions():
    transformed = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, 4.0]]]])  # (1, 2, 2, 2)
    torch.testing.assert_close(pool_filter(transformed), torch.tensor([[4.0, 1.0]]))


def test_cosine_attention_of_a_hand_worked_case():
    # Positions: along the filter, against it, at right angles, at 60 degrees.
    transformed = torch.tensor([[2.0, -3.0, 0.0, 1.0], [0.0, 0.0, 5.0, math.sqrt(3)]]).view(1, 2, 2, 2)
    kappa = torch.tensor([[10.0, 0.0]])
    shift = guided_attention(transformed, kappa, AttentionConfig(num_scales=1))
    torch.testing.assert_close(shift, torch.tensor([[[1.0, 0.0], [0.5, 0.75]]]))
    relu = guided_attention(transformed, kappa, AttentionConfig(num_scales=1, cosine_range="relu"))
    torch.testing.assert_close(relu, torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]))


def test_correlation_and_softmax_of_a_hand_worked_case():
    transformed = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 0.0]]).view(1, 2, 2, 2)
    kappa = torch.tensor([[2.0, 1.0]])
    bare = guided_attention(transformed, kappa, AttentionConfig(num_scales=1, norm="none"))
    torch.testing.assert_close(bare, torch.tensor([[[2.0, 5.0], [6.0, 8.0]]]))
    softmax = guided_attention(transformed, kappa, AttentionConfig(num_scales=1, norm="softmax"))
    torch.testing.assert_close(softmax, torch.tensor([2.0, 5.0, 6.0, 8.0]).softmax(0).view(1, 2, 2))


def test_two_scales_average_the_full_and_the_upsampled_half_resolution():
    torch.manual_seed(0)
    transformed, kappa = torch.randn(2, 6, 4, 6), torch.randn(2, 6)
    got = guided_attention(transformed, kappa, AttentionConfig(num_scales=2))
    full = (F.cosine_similarity(transformed, kappa[:, :, None, None], dim=1) + 1) / 2
    pooled = transformed.view(2, 6, 2, 2, 3, 2).mean(dim=(3, 5))
    half = (F.cosine_similarity(pooled, kappa[:, :, None, None], dim=1) + 1) / 2
    half = F.interpolate(half[:, None], size=(4, 6), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(got, (full + half) / 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_scales", [1, 2, 3])
@pytest.mark.parametrize(
    ("norm", "cosine_range"),
    [("cosine", "shift"), ("cosine", "relu"), ("cosine", "minmax"), ("softmax", "shift")],
)
def test_attention_keeps_its_size_and_stays_in_the_unit_range(size, num_scales, norm, cosine_range):
    torch.manual_seed(1)
    transformed, kappa = torch.randn(3, 5, *size), torch.randn(3, 5)
    config = AttentionConfig(norm=norm, cosine_range=cosine_range, num_scales=num_scales)
    attention = guided_attention(transformed, kappa, config)
    assert attention.shape == (3, *size) and attention.dtype == torch.float32
    assert attention.min() >= 0 and attention.max() <= 1
    if norm == "softmax":
        torch.testing.assert_close(attention.flatten(1).sum(1), torch.ones(3))


def test_pooling_the_output_of_g_equals_g_of_the_pooled_input():
    torch.manual_seed(2)
    transform = CorrelationTransform(4, 6, 3, NORM_3D).eval()
    features = torch.randn(2, 4, 2, 8, 8)
    pooled_after = F.avg_pool3d(transform(features), (1, 2, 2))
    pooled_before = transform(F.avg_pool3d(features, (1, 2, 2)))
    torch.testing.assert_close(pooled_after, pooled_before)


def test_halving_time_is_an_option():
    torch.manual_seed(3)
    transformed, kappa = torch.randn(1, 5, 4, 4, 4), torch.randn(1, 5)
    kept = guided_attention(transformed, kappa, AttentionConfig())
    halved = guided_attention(transformed, kappa, AttentionConfig(halve_time=True))
    assert kept.shape == halved.shape and not torch.allclose(kept, halved)


@pytest.mark.parametrize(("num_dims", "size", "norm"), [(2, (9, 4), NORM_2D), (3, (4, 8, 8), NORM_3D)])
def test_predicted_attention_has_one_sigmoid_value_per_position(num_dims, size, norm):
    predicted = predicted_attention(SaliencyHead(6, num_dims, norm)(torch.randn(2, 6, *size)))
    assert predicted.shape == (2, *size)
    assert 0 < predicted.min() and predicted.max() < 1


def test_four_scales_are_refused():
    with pytest.raises(ValueError, match="num_scales is 4, expected 1, 2 or 3"):
        AttentionConfig(num_scales=4)
