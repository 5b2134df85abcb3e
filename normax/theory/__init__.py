"""Update rules with their theory: effective learning rates, equilibria, schedules.

Behind normalization layers, gradient noise lengthens a weight vector and weight decay
shortens it, until both balance. `UPDATE_RULES` holds the papers' rules as optax
transformations; each knows its effective learning rate, the norm and the angle per
step where it settles, and the time until then. The schedules replace weight decay by a
growing rate, or are ones that optax lacks.
"""

from normax.theory.rules import UPDATE_RULES, UpdateRule
from normax.theory.schedules import (
    exponential_equivalent_schedule,
    harmonic_schedule,
    optimal_momentum,
)

__all__ = [
    "UPDATE_RULES",
    "UpdateRule",
    "exponential_equivalent_schedule",
    "harmonic_schedule",
    "optimal_momentum",
]
