"""What a pretrained model does: localisation, retrieval, and the report of a run."""
