"""Batch normalization, folded into the layers before it."""
