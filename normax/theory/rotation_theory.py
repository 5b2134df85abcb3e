"""What a rule and its rates say of arrays whose angle per step was measured."""

import copy
from typing import Any

import numpy as np

from normax._core.checks import check_number, check_positive
from normax.theory.equilibrium import NoEquilibriumError
from normax.theory.rules import UPDATE_RULES
from normax.theory.update_rule import UpdateRule

# Above this share of entries that an update does not change, training stalls.
LOST = 0.5

# The monitor keeps no shapes, which the angle under Muon depends on a little.
_MATRIX = (1024.0, 1536.0)

# Decay that is this small changes no correlation of steps.
_NO_DECAY = 1e-6


class RotationTheory:
    r"""What a rule and its rates say of arrays whose angle per step was measured.

    Attributes:
      rotation: Angle per step in equilibrium; NaN where it is not known.
      reason: Why it is not known.
      correlation: Share of the steps of a random walk that momentum does not repeat,
        $(1 - \cos\theta) / \kappa$; for AdamW $(1 - b_1) / (1 + b_1)$.
      power: The power of the norm with which the angle per step falls.
      decay: Share $\kappa$ of the norm that decay takes per step; NaN likewise.
    """

    def __init__(self, rule, rates, hyperparameters, step, matrix=_MATRIX):
        """Take a schedule at the step that was measured, and Muon's matrix."""
        self.rotation, self.decay, self.correlation = np.nan, np.nan, 1.0
        self.reason = ""
        self.rule, self.hyperparameters = rule, hyperparameters
        if rule is None:
            return
        self.power = rule._power(hyperparameters)
        learning_rate, weight_decay = rates
        if callable(learning_rate):
            learning_rate = learning_rate(step)
        check_number("learning_rate", learning_rate)
        self.rates = learning_rate, weight_decay
        # What depends on the last two cancels in the ratio.
        self.others = 1.0, matrix if rule.of_matrices else 1.0
        if rule.theory is None:
            self.reason = f"{rule.name} has no equilibrium"
        elif float(learning_rate) == 0:
            self.reason = "the learning rate is 0"
        else:
            check_positive("weight_decay", weight_decay)
            self._settle()

    def _settle(self) -> None:
        rule, given = self.rule, (*self.rates, *self.others)
        try:
            settled = rule._settle((), given, self.hyperparameters)
        except NoEquilibriumError:
            self.reason = f"{rule.name} has no equilibrium: steps scale with the norm"
            # They are as much alike as steps of another scale, and decay is the same.
            flipped = {rule.flipped_power[0]: False}
            settled = rule._settle((), given, self.hyperparameters | flipped)
        versine = 2 * np.sin(float(settled.rotation) / 2) ** 2
        self.correlation = versine / float(settled.decay_rate)
        known = "dimension" if rule.of_matrices else ""
        if needs := [n for n in rule.theory.rotation_needs if n != known]:
            self.reason = f"depends on the {needs[0]}".replace("_", " ")
            return
        self.decay = float(settled.decay_rate)
        if not self.reason:
            self.rotation = float(settled.rotation)

    def unknown(self, reason: str) -> "RotationTheory":
        """Return what is left of the theory where the angle is not known."""
        other = copy.copy(self)
        other.rotation, other.reason = np.nan, reason
        return other

    def steps_left(self, excess: float) -> float:
        r"""Return the steps until equilibrium, from how much faster a vector turns.

        The angle per step is in proportion to $\|w\|^{-p}$. So the norm is
        $\text{excess}^{-1/p}$ times that of equilibrium, whatever the gradient is.
        """
        if not (np.isfinite(excess) and excess > 0 and self.power):
            return np.nan
        given = (*self.rates, *self.others)
        settled = self.rule.equilibrium_norm(*given, **self.hyperparameters)
        start = settled * excess ** (-1 / self.power)
        time = self.rule.equilibrium_time
        return float(time(*given, initial_norm=start, **self.hyperparameters))

    def verdict(self, norm: float, angle: float, steps_left: float, lost: float) -> str:
        """Say what the numbers of one array mean."""
        excess = angle / self.rotation
        if not (np.isfinite(norm) and np.isfinite(angle)):
            return "not finite"
        if norm == 0:
            return "all weights are 0"
        if lost > LOST:
            return (
                f"{lost:.0%} of the updates are rounded away: keep float32 parameters"
            )
        if np.isnan(excess):
            return self.reason
        if excess == 0:
            return "does not turn"
        if steps_left == 0:
            return "in equilibrium"
        if excess > 1:
            return f"{excess:.2g} times too fast: should grow"
        return f"{1 / excess:.2g} times too slow: should shrink"


def theory_of_adam(
    rule: UpdateRule, rates: tuple[Any, Any], hyperparameters: dict[str, Any]
) -> RotationTheory:
    """Return what holds for arrays that Muon leaves to its own AdamW."""
    values = rule._values(hyperparameters)
    # In optax 0.2.6 Adam has Muon's rate.
    rate, decay = values.get("adam_learning_rate"), values["adam_weight_decay"]
    rate = rates[0] if rate is None else rate
    check_number("adam_learning_rate", rate)
    given = {"b1": values["adam_b1"], "b2": values["adam_b2"]}
    adamw = UPDATE_RULES["adamw"]
    if float(decay) > 0:
        return RotationTheory(adamw, (rate, decay), given, 0)
    theory = RotationTheory(adamw, (rate, _NO_DECAY / rate), given, 0)
    theory.decay = 0.0
    return theory.unknown(f"{rule.name}'s Adam has no decay (adam_weight_decay)")


def rule_of(
    rule: str | UpdateRule | None, rates: tuple[Any, Any], hyperparameters: Any
) -> UpdateRule | None:
    """Return the rule, or raise unless all of them fit together."""
    if isinstance(rule, str):
        rule = UPDATE_RULES[rule]
    if rule is None:
        if hyperparameters or rates != (None, None):
            raise ValueError(
                f"rates belong to a rule, but rule is None and learning_rate, "
                f"weight_decay are {rates}; name one of {', '.join(UPDATE_RULES)}."
            )
        return None
    if not isinstance(rule, UpdateRule):
        raise ValueError(
            f"rule must be one of {', '.join(UPDATE_RULES)}, or None, got {rule!r}; "
            "pass its name."
        )
    if None in rates:
        raise ValueError(
            f"the equilibrium of {rule.name} depends on both rates, but learning_rate "
            f"is {rates[0]} and weight_decay {rates[1]}; pass both."
        )
    rule._values(hyperparameters)  # refuses unknown ones
    return rule
