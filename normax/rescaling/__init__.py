"""Rescalings of hidden units, which keep the function of a ReLU network."""
