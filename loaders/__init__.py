"""Shards to batches: decoding, cropping, log-mel and augmentation."""
