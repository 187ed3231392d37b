"""Ranks and their devices: what cannot train together, or not on the GPUs that are there, is refused at the start."""

import dataclasses
import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from cmac.config import PRESETS


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as the system goes."""
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15\nGCC version: 12\n"
    )
    monkeypatch.setattr(train, "DEVICES", tmp_path)
    monkeypatch.setattr(train, "DRIVER", tmp_path / "version")


def choose(device: str) -> torch.device:
    return train.choose_device(dataclasses.replace(PRESETS["demo"](), device=device))


def test_gpus_that_torch_cannot_use_are_not_left_for_the_cpu(
    no_cuda: None, gpus: None, tmp_path: Path
) -> None:
    expected = rf"has {tmp_path}/nvidia0, {tmp_path}/nvidia1 but torch .* 550\.54\.15\); .*driver 580"
    with pytest.raises(ValueError, match=expected):
        choose("auto")


def test_whoever_wants_the_cpu_gets_it(
    no_cuda: None, gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose("auto").type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(train, "DEVICES", tmp_path / "none")
    assert choose("auto").type == "cpu"


def test_a_rank_on_another_kind_of_device_than_rank_0_is_refused(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.TCPStore(
        "127.0.0.1", free_port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    store.set("cmac/device/0", "cuda on head")
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    expected = rf"rank 1 is to train on cpu on {re.escape(socket.gethostname())}, rank 0 on cuda on head"
    with pytest.raises(ValueError, match=expected):
        train.join_ranks(1, 2, torch.device("cpu"))
    assert not dist.is_initialized()
