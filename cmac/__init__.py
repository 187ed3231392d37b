"""Cross-Modal Attention Consistency: encoders, attention, losses, pretraining and evaluation."""

from cmac.checkpoint import load_checkpoint
from cmac.model import CMAC, ModelConfig

__all__ = ["CMAC", "ModelConfig", "load_checkpoint"]
