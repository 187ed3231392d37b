"""Batch norm with shortcut and ReLU: torch's numbers, group by group, and state that torch can load."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cmac.norm import BatchNorm2d, BatchNorm3d, apply_norm, build_norm_layers, hold_statistics

LAYERS = [lambda: BatchNorm2d(3), lambda: BatchNorm2d(3, group_size=2)]


def filled(norm: nn.Module, seed: int = 0) -> nn.Module:
    """norm with weights and statistics that are not their initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


def assert_same_state(norm: nn.Module, other: nn.Module) -> None:
    state, expected = norm.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        torch.testing.assert_close(state[name], expected[name])


# Groups


def test_grouped_batch_norm_normalizes_each_group_by_itself():
    norm_2d, _ = build_norm_layers(4)
    grouped, plain = norm_2d(3), nn.BatchNorm2d(3)
    x = torch.randn(8, 3, 5, 5, requires_grad=True)
    out = grouped(x)
    expected = torch.cat([nn.BatchNorm2d(3)(x[:4]), nn.BatchNorm2d(3)(x[4:])])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert x.grad is not None and grouped.num_batches_tracked == 1

    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    first(x[:4]), second(x[4:])
    torch.testing.assert_close(grouped.running_mean, (first.running_mean + second.running_mean) / 2)
    torch.testing.assert_close(grouped.running_var, (first.running_var + second.running_var) / 2)
    plain.load_state_dict(grouped.state_dict(), strict=True)
    torch.testing.assert_close(grouped.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("num_clips", [1, 4, 6])
def test_grouped_batch_norm_takes_undividable_batches_whole(num_clips):
    norm = build_norm_layers(4)[0](3)
    assert isinstance(norm, BatchNorm2d)
    x = torch.randn(num_clips, 3, 5, 5)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3)(x))


# Shortcut and ReLU


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 3, 2, 5, 7)])
def test_forward_is_torchs_batch_norm_then_add_then_relu(shape, with_shortcut, relu, training):
    torch.manual_seed(0)
    ours, theirs = (BatchNorm2d, nn.BatchNorm2d) if len(shape) == 4 else (BatchNorm3d, nn.BatchNorm3d)
    norm, expected_norm = filled(ours(3)).train(training), filled(theirs(3)).train(training)
    x, shortcut = torch.randn(shape), torch.randn(shape) if with_shortcut else None
    results = []
    for layer in (norm, expected_norm):
        inputs = [v.clone().requires_grad_() for v in (x, shortcut) if v is not None]
        if layer is norm:
            out = layer(*inputs, relu=relu)
        else:
            out = layer(inputs[0]) + (inputs[1] if with_shortcut else 0)
            out = F.relu(out) if relu else out
        (out * torch.arange(out.numel()).view(shape)).sum().backward()
        results.append([out, *(v.grad for v in inputs), layer.weight.grad, layer.bias.grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert_same_state(norm, expected_norm)


def test_inputs_are_left_as_they_were():
    x, shortcut = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    before = x.clone(), shortcut.clone()
    for layer in (BatchNorm2d(3), BatchNorm2d(3, group_size=2), nn.BatchNorm2d(3), nn.Identity()):
        apply_norm(layer, x)
        apply_norm(layer, x, shortcut)
    assert torch.equal(x, before[0]) and torch.equal(shortcut, before[1])


def test_output_and_shortcut_have_xs_dtype():
    x = torch.randn(4, 3, 5, 5).bfloat16()
    for group_size in (None, 2):
        out = BatchNorm2d(3, group_size=group_size)(x, torch.randn(4, 3, 5, 5), relu=True)
        assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: BatchNorm2d(3), lambda: nn.BatchNorm2d(3)])
def test_apply_norm_takes_our_layers_and_others(make):
    x, shortcut = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    plain = nn.BatchNorm2d(3)(x)
    torch.testing.assert_close(apply_norm(make(), x), plain.relu())
    torch.testing.assert_close(apply_norm(make(), x, relu=False), plain)
    torch.testing.assert_close(apply_norm(make(), x, shortcut), (plain + shortcut).relu())
    torch.testing.assert_close(apply_norm(make(), x, shortcut, relu=False), plain + shortcut)


def test_state_dict_is_torchs_both_ways():
    for ours, theirs in (
        (BatchNorm2d(3, group_size=2), nn.BatchNorm2d(3)),
        (BatchNorm3d(3), nn.BatchNorm3d(3)),
    ):
        theirs.load_state_dict(filled(ours).state_dict(), strict=True)
        ours.load_state_dict(filled(theirs, seed=1).state_dict(), strict=True)
        assert_same_state(ours, theirs)


def test_copies_and_conversion_to_synchronized_batch_norm_keep_what_they_need():
    norm = build_norm_layers(2, "reference")[1](3)
    copied = copy.deepcopy(norm)
    assert (copied.group_size, copied.impl) == (2, "reference")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(filled(norm)))
    assert isinstance(converted[0], nn.SyncBatchNorm)
    assert_same_state(converted[0], norm)


# Statistics that stand still


@pytest.mark.parametrize("make", [*LAYERS, lambda: nn.BatchNorm2d(3)])
def test_hold_statistics_changes_no_output_and_no_state(make):
    norm, x = nn.Sequential(filled(make())), torch.randn(4, 3, 5, 5)
    before = copy.deepcopy(norm)
    with hold_statistics(norm):
        held = norm(x)
    assert_same_state(norm[0], before[0])
    torch.testing.assert_close(norm(x), held)
    assert norm[0].num_batches_tracked == 1 and norm[0].track_running_stats
    with hold_statistics(norm.eval()):
        evaluated = norm(x)
    torch.testing.assert_close(norm(x), evaluated)


def test_hold_statistics_takes_synchronized_batch_norms_and_ends_with_an_error():
    norm, ours = nn.SyncBatchNorm(3), BatchNorm2d(3)
    mean = norm.running_mean
    with pytest.raises(RuntimeError, match="stop"), hold_statistics(nn.Sequential(norm, ours)):
        norm.running_mean.add_(1)
        norm.num_batches_tracked.add_(1)
        assert not ours.track_running_stats
        raise RuntimeError("stop")
    assert norm.running_mean is mean and not mean.any() and norm.num_batches_tracked == 0
    assert norm.track_running_stats and ours.track_running_stats


@pytest.mark.parametrize("make", [*LAYERS, lambda: nn.BatchNorm2d(3)])
def test_a_checkpoint_that_runs_again_counts_a_batch_once(make):
    norm = filled(make())
    expected = copy.deepcopy(norm)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    apply_norm(expected, x).square().sum().backward()
    expected_grad, x.grad = x.grad, None
    out = checkpoint(
        lambda x: apply_norm(norm, x),
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), hold_statistics(norm)),
    )
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, expected_grad)
    assert_same_state(norm, expected)


# torch.compile


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 1, 1), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.norm(self.conv(x), relu=True), x, relu=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", LAYERS)
def test_compiled_layers_trace_whole_and_give_the_same_numbers_and_state(make, dtype):
    torch.manual_seed(0)
    block = Block(filled(make()))
    x = torch.randn(4, 3, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    if dtype == torch.float64:
        block = block.double()
    block.conv = block.conv.to(dtype)
    compiled_block = copy.deepcopy(block)
    compiled = torch.compile(compiled_block, backend="eager", fullgraph=True)
    results = []
    for function in (block, compiled):
        given = x.clone().requires_grad_()
        out = function(given)
        out.square().sum().backward()
        results.append([out, given.grad])
    tolerance = {torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    state_tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for name, value in block.state_dict().items():
        got = compiled_block.state_dict()[name]
        torch.testing.assert_close(got, value, atol=state_tolerance, rtol=state_tolerance)


# The choice


def test_the_reference_runs_on_the_cpu_and_fused_says_what_is_missing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(BatchNorm2d(3)(x), nn.BatchNorm2d(3)(x))
    with pytest.raises(ValueError, match="impl is 'fused', but tensors are on cpu"):
        BatchNorm2d(3, impl="fused")(x)
    BatchNorm2d(3, impl="fused").eval()(x)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, torch.randn(4, 3, 5, 5), "x is not channels-last in memory"),
        ({}, torch.randn(4, 3, 5, 5).double().to(memory_format=torch.channels_last), "x is torch.float64"),
        ({"affine": False}, torch.randn(4, 3, 5, 5), "weights are absent"),
    ],
)
def test_fused_says_what_it_cannot_take(options, x, message):
    with pytest.raises(ValueError, match=message):
        BatchNorm2d(3, impl="fused", **options)(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size is 0, expected at least 1"),
        ({"momentum": None}, "momentum is None"),
        ({"impl": "quick"}, "impl is 'quick', expected auto or reference or fused"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNorm2d(3, **options)


@pytest.mark.parametrize("make", LAYERS)
def test_one_value_per_channel_is_refused_as_torch_does(make):
    x = torch.randn(2, 3, 1, 1)
    norm = make() if make().group_size is None else BatchNorm2d(3, group_size=1)
    x = x[:1] if norm.group_size is None else x
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(x)
    with pytest.raises(Exception, match="more than 1 value per channel"):
        torch.compile(norm, backend="eager", fullgraph=True)(x)
