"""Cross-Modal Attention Consistency: encoders, attention, losses, pretraining and evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmac.checkpoint import load_checkpoint
    from cmac.model import CMAC, ModelConfig
    from cmac.weights import Encoders, load

__all__ = ["CMAC", "Encoders", "ModelConfig", "load", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    # On demand: the model and its kernels need torch alone, checkpoints need what configurations are read with.
    if name == "load_checkpoint":
        from cmac.checkpoint import load_checkpoint

        return load_checkpoint
    if name in ("Encoders", "load"):
        from cmac import weights

        return getattr(weights, name)
    if name in ("CMAC", "ModelConfig"):
        from cmac import model

        return getattr(model, name)
    raise AttributeError(f"module 'cmac' has no attribute {name!r}")
