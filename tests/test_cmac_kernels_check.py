"""Kernels are tried before a run relies on them, and a kernel that fails or errs costs speed, not the run."""

import sys
from collections.abc import Callable

import pytest
import torch

from cmac.compute import ComputeConfig
from cmac.kernels import check

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def faults() -> list[str | None]:
    return [check.find_fault(part, CPU) for part in (check._batch_norm, check._losses)]


def faults_of_a_miscompiled_kernel() -> list[str | None]:
    from cmac.kernels import batch_norm_triton, info_nce_triton

    right = batch_norm_triton.fused_batch_norm, info_nce_triton.fused_info_nce
    batch_norm_triton.fused_batch_norm = lambda *args: right[0](*args) * 1.1
    info_nce_triton.fused_info_nce = lambda *args: tuple(part * float("nan") for part in right[1](*args))
    try:
        return faults()
    finally:
        batch_norm_triton.fused_batch_norm, info_nce_triton.fused_info_nce = right


def test_right_kernels_have_no_fault(interpreter: Callable):
    assert interpreter(faults) == [None, None]


def test_wrong_results_are_faults(interpreter: Callable):
    batch_norm, losses = interpreter(faults_of_a_miscompiled_kernel)
    assert "from plain torch's" in batch_norm and "its results are nan from" in losses


@pytest.mark.gpu
def test_right_kernels_have_no_fault_on_the_gpu():
    compute, lines = check.resolve_compute(ComputeConfig(), CUDA)
    assert (compute.batch_norm, compute.losses) == ("fused", "fused"), lines


def test_a_kernel_that_fails_gives_way_to_plain_torch(monkeypatch):
    """As on a GPU whose driver refuses it: here there is no GPU at all."""
    pytest.importorskip("triton")

    def refuse(impl: str, device: torch.device) -> list[torch.Tensor]:
        raise RuntimeError("ptxas exited with code 255\nand more")

    monkeypatch.setattr(check, "_losses", refuse)
    monkeypatch.setattr(check, "_batch_norm", lambda impl, device: [torch.ones(2)])
    compute, lines = check.resolve_compute(ComputeConfig(), CUDA)
    assert (compute.batch_norm, compute.losses) == ("fused", "reference")
    assert lines == [
        "compute.batch_norm: fused (the kernels agree with plain torch here)",
        "compute.losses: reference (slower than with the kernels: RuntimeError: ptxas exited with code 255)",
    ]


def test_on_the_cpu_nothing_is_tried():
    compute, lines = check.resolve_compute(ComputeConfig(), CPU)
    assert (compute.batch_norm, compute.losses) == ("reference", "reference")
    assert lines == ["compute.batch_norm: reference (on cpu)", "compute.losses: reference (on cpu)"]


def test_choices_of_the_user_are_left_alone(monkeypatch):
    monkeypatch.setattr(check, "find_fault", lambda part, device: sys.exit("tried"))
    chosen = ComputeConfig(batch_norm="fused", losses="reference")
    assert check.resolve_compute(chosen, CUDA) == (chosen, [])
    compiled, lines = check.resolve_compute(ComputeConfig(compile=True, losses="fused"), CUDA)
    assert (compiled.batch_norm, lines) == ("reference", [])
