"""Which implementation of an operation runs: plain torch, or the Triton kernel with the same result."""

import functools
import importlib.util
import logging
import os
from typing import Literal, get_args

import torch

Impl = Literal["auto", "reference", "fused"]
"""`reference`: plain torch, everywhere. `fused`: Triton, on CUDA tensors, or on CPU tensors with TRITON_INTERPRET=1 in
the environment when Triton is imported. `auto`: fused on CUDA where Triton is installed, else the reference."""

LEAST_CAPABILITY = (8, 0)

log = logging.getLogger(__name__)


def choose_impl(operation: str, impl: Impl, device_type: str) -> Literal["reference", "fused"]:
    """What `impl` means for an operation on this kind of device. `auto`'s choice is logged once.

    Raises:
        ValueError: impl is not one of `Impl`, or `fused` cannot run here; the message says what is missing.
    """
    if impl == "auto":
        return _automatic(operation, device_type)
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl!r}, expected {' or '.join(get_args(Impl))}")
    if impl == "fused":
        why_not = why_not_fused(device_type)
        if why_not:
            raise ValueError(f"impl is 'fused', but {why_not}; expected impl 'auto' or 'reference' here")
    return impl


def why_not_fused(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch for CUDA on Linux)"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {device_type} and TRITON_INTERPRET=1 is not set"
    if device_type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            return f"the GPU has compute capability {capability}, Triton needs {LEAST_CAPABILITY}"
    return None


@functools.cache
def _automatic(operation: str, device_type: str) -> Literal["reference", "fused"]:
    why_not = why_not_fused(device_type) if device_type == "cuda" else "tensors are on the CPU"
    if why_not and device_type == "cuda":
        log.warning("%s: %s; runs in plain torch, which is slower", operation, why_not)
    choice = "reference" if why_not else "fused"
    log.info("%s on %s: %s", operation, device_type, choice)
    return choice
