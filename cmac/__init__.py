"""Cross-Modal Attention Consistency: encoders, attention, losses, pretraining and evaluation."""
