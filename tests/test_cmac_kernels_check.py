"""Kernels are tried before a run relies on them, and a kernel that fails or errs costs speed, not the run."""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from cmac.attention import AttentionConfig
from cmac.compute import ComputeConfig
from cmac.kernels import check

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOSSES = partial(check._losses, num_clips=3, dim=20, attention=AttentionConfig(detach_target=False))


def faults() -> list[str | None]:
    return [check.find_fault(part, CPU) for part in (check._batch_norm, LOSSES)]


def faults_of_miscompiled_kernels() -> list[str | None]:
    """One channel of 45 a little wrong, one of the losses not a number."""
    from cmac.kernels import batch_norm_triton, info_nce_triton

    def wrong_channel(*args: object) -> torch.Tensor:
        scale = torch.ones(45, 1, 1, 1)
        scale[17] = 1.06
        return norm(*args) * scale

    def wrong_loss(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, correct = info_nce(*args)
        return torch.cat([loss[:-1], loss[-1:] * float("nan")]), correct

    norm, info_nce = batch_norm_triton.fused_batch_norm, info_nce_triton.fused_info_nce
    batch_norm_triton.fused_batch_norm, info_nce_triton.fused_info_nce = wrong_channel, wrong_loss
    try:
        return faults()
    finally:
        batch_norm_triton.fused_batch_norm, info_nce_triton.fused_info_nce = norm, info_nce


def test_right_kernels_have_no_fault(interpreter: Callable):
    assert interpreter(faults) == [None, None]


def test_wrong_results_are_faults(interpreter: Callable):
    batch_norm, losses = interpreter(faults_of_miscompiled_kernels)
    assert "from plain torch's" in batch_norm and "are nan from" in losses


@pytest.mark.gpu
@pytest.mark.parametrize("num_clips", [8, 16, 32, 64, 128])
def test_right_kernels_have_no_fault_on_the_gpu(num_clips):
    compute, lines = check.resolve_compute(
        ComputeConfig(), CUDA, num_clips=num_clips, attention=AttentionConfig(detach_target=False)
    )
    assert compute == ComputeConfig(), lines


def test_a_kernel_that_fails_gives_way_to_plain_torch(monkeypatch):
    """As on a GPU whose driver refuses it: here there is no GPU at all."""
    pytest.importorskip("triton")

    def refuse(impl: str, device: torch.device, **options: object) -> Iterator:
        raise RuntimeError("ptxas exited with code 255\nand more")

    monkeypatch.setattr(check, "_losses", refuse)
    monkeypatch.setattr(check, "_batch_norm", lambda impl, device: iter([(torch.float32, torch.ones(2, 2))]))
    compute, lines = check.resolve_compute(ComputeConfig(), CUDA)
    assert compute == ComputeConfig(losses="reference")
    assert lines == [
        "compute.batch_norm: kernels (they agree with plain torch here)",
        "WARNING: compute.losses: plain torch, which is slower, as the kernels fail here: "
        "RuntimeError: ptxas exited with code 255",
    ]


def test_on_the_cpu_nothing_is_tried():
    compute, lines = check.resolve_compute(ComputeConfig(), CPU)
    assert compute == ComputeConfig()
    assert lines == ["compute.batch_norm: plain torch (on cpu)", "compute.losses: plain torch (on cpu)"]


def test_choices_of_the_user_are_left_alone(monkeypatch):
    monkeypatch.setattr(check, "find_fault", lambda part, device: sys.exit("tried"))
    for chosen in (
        ComputeConfig(batch_norm="fused", losses="reference"),
        ComputeConfig(compile=True, batch_norm="reference", losses="fused"),
    ):
        assert check.resolve_compute(chosen, CUDA) == (chosen, [])


def test_compiled_encoders_leave_the_other_batch_norms_to_the_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(check, "find_fault", lambda part, device: None)
    compute, lines = check.resolve_compute(ComputeConfig(compile=True, losses="reference"), CUDA)
    assert compute.batch_norm == "auto"
    assert lines == [
        "compute.batch_norm: kernels (they agree with plain torch here), torch.compile's in the encoders"
    ]
