"""Rescalings of hidden units, which keep the function of a ReLU network.

What enters a hidden unit may be multiplied by c > 0 if what leaves it is divided by c.
Here are such rescalings, given and random; the one that makes all norms of incoming
weights as small as they can be (`balance`); and the norms that it balances.
"""

from normax.rescaling.balance import balance, group_norm, max_norm
from normax.rescaling.units import random_rescaling, rescale_units

__all__ = [
    "balance",
    "group_norm",
    "max_norm",
    "random_rescaling",
    "rescale_units",
]
