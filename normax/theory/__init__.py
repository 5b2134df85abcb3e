"""Update rules with their theory: effective learning rates, equilibria, schedules.

Behind normalization layers, gradient noise lengthens a weight vector and weight decay
shortens it, until both balance. The rules in `UPDATE_RULES` know where, and when, and
predict a whole run under any schedule.
"""

from normax.theory.dynamics import (
    ArrayDynamics,
    DynamicsTable,
    dynamics_scalars,
    dynamics_table,
)
from normax.theory.hyperball import (
    hyperball_angle,
    hyperball_correlation,
    hyperball_learning_rate,
)
from normax.theory.prediction import Prediction
from normax.theory.rules import UPDATE_RULES
from normax.theory.schedules import (
    exponential_equivalent_schedule,
    harmonic_schedule,
    optimal_momentum,
)
from normax.theory.settings import Setting
from normax.theory.transferred_rates import Transfer, transfer
from normax.theory.update_rule import UpdateRule

__all__ = [
    "UPDATE_RULES",
    "ArrayDynamics",
    "DynamicsTable",
    "Prediction",
    "Setting",
    "Transfer",
    "UpdateRule",
    "dynamics_scalars",
    "dynamics_table",
    "exponential_equivalent_schedule",
    "harmonic_schedule",
    "hyperball_angle",
    "hyperball_correlation",
    "hyperball_learning_rate",
    "optimal_momentum",
    "transfer",
]
