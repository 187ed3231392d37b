"""Fused GPU versions of what the reference modules beside this package define."""
