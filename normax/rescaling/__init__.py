"""Rescalings of hidden units, which keep the function of a ReLU network."""

from normax.rescaling.balance import balance, group_norm, max_norm
from normax.rescaling.units import random_rescaling, rescale_units

__all__ = [
    "balance",
    "group_norm",
    "max_norm",
    "random_rescaling",
    "rescale_units",
]
