"""Assertions about invariance, in the manner of chex."""
