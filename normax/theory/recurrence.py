"""A rule as papers print it: an optax call, its hyperparameters, its effective rate."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from normax._core.axes import PyTree
from normax._core.checks import (
    check_learning_rate,
    check_number,
    check_positive,
    check_range,
    nearest,
    requiring_params,
)

# The number of entries of a weight vector, or the rows and columns of a matrix.
Dimension = (
    jax.typing.ArrayLike | tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None
)


def _kind(value: Any) -> Any:
    return None if value is None else type(value)


class Hyperparameter(NamedTuple):
    """One keyword of the optax call that is an update rule."""

    name: str
    default: Any
    # A number must lie in [0, below). It is None for switches, types and functions.
    below: float | None = math.inf
    # True where the equilibrium is known for all values. `Theory.settle` then takes it.
    in_theory: bool = False
    # True where it is of other arrays than those that the theory is about.
    aside: bool = False
    # True for what must be above 0, or None where it is left out.
    positive: bool = False

    def or_zero(self, value: Any) -> Any:
        """Return `value`, or 0 for a number that is None, as momentum may be."""
        return 0.0 if value is None and self.below is not None else value

    def check(self, value: Any) -> None:
        """Raise unless a number is in range, or not known yet."""
        if self.positive:
            check_positive(self.name, value)
        elif self.below is not None:
            check_range(self.name, value, low=0, below=self.below)

    def is_default(self, value: Any) -> bool:
        """Return whether `value` is known to do what the default does."""
        if isinstance(value, jax.core.Tracer):
            return False
        return bool(np.all(self.or_zero(value) == self.or_zero(self.default)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrence:
    """What a step of an update rule is. `UpdateRule` adds what follows from it."""

    name: str
    norm_power: int
    # The optax call that is the rule.
    optimizer: Callable[..., optax.GradientTransformation] = dataclasses.field(
        repr=False
    )
    # All keywords of the call but the learning rate and the weight decay.
    hyperparameters: tuple[Hyperparameter, ...] = dataclasses.field(repr=False)
    # True where the call takes the weight decay. Otherwise the gradient gets it.
    decays_itself: bool = dataclasses.field(default=False, repr=False)
    # True where a step takes a whole matrix, so that the theory needs both dimensions.
    of_matrices: bool = dataclasses.field(default=False, repr=False)
    # A switch that changes the power when it is flipped, and the power then.
    flipped_power: tuple[str, int] | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def make(self) -> Callable[..., optax.GradientTransformationExtraArgs]:
        """Function `make(learning_rate, weight_decay=0.0, **hyperparameters)`.

        It returns the transformation, which needs `params`. The learning rate is a
        number or a schedule. The hyperparameters have optax's names. All parameters
        decay; `optax.partition` can give the rule to some of them.
        """

        def make(learning_rate, weight_decay=0.0, **hyperparameters):
            values = self._values(hyperparameters)
            check_learning_rate(learning_rate)
            check_range("weight_decay", weight_decay, low=0)
            for h in self.hyperparameters:
                h.check(values[h.name])
            if self.decays_itself:
                rule = self.optimizer(
                    learning_rate, weight_decay=weight_decay, **values
                )
            else:
                rule = optax.chain(
                    optax.add_decayed_weights(weight_decay),
                    self.optimizer(learning_rate, **values),
                )
            return requiring_params(f"UPDATE_RULES[{self.name!r}]", rule)

        # `optax.inject_hyperparams` and `help` read the hyperparameters from here.
        first = list(inspect.signature(make).parameters.values())[:2]
        rest = [
            inspect.Parameter(h.name, inspect.Parameter.KEYWORD_ONLY, default=h.default)
            for h in self.hyperparameters
        ]
        make.__signature__ = inspect.Signature(first + rest)  # type: ignore[attr-defined]
        return make

    def effective_learning_rate(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_norm: PyTree,
        **hyperparameters: Any,
    ) -> PyTree:
        r"""Learning rate of the rule on weights of norm one.

        $$\eta_\mathrm{eff} = \eta / \|w\|^p$$

        With it, a step from $w / \|w\|$ arrives at the same function as the rule's step
        from scale-invariant weights $w$, for adaptive rules as $\epsilon \to 0$.

        Args:
          learning_rate: Learning rate $\eta$.
          weight_norm: Norms: a number, an array, or a pytree as of `weight_norm`.
          **hyperparameters: Those of `make`. The power depends on Adafactor's
            `multiply_by_parameter_scale` and on Muon's `adaptive`.

        Returns:
          Effective learning rates, in the structure of `weight_norm`.

        Raises:
          TypeError: The rule has no such hyperparameter.
          ValueError: The learning rate is no number.

        Examples:
          >>> import normax
          >>> normax.UPDATE_RULES["momentum"].effective_learning_rate(0.1, 2.0)
          0.025
        """
        check_number("learning_rate", learning_rate)
        power = self._power(hyperparameters)
        return jax.tree.map(lambda norm: learning_rate / norm**power, weight_norm)

    def _power(self, given: dict[str, Any]) -> int:
        """Return the power of the norm, which a hyperparameter may change."""
        values = self._values(given)
        for h in self.hyperparameters:
            if self.flipped_power and h.name == self.flipped_power[0]:
                return (
                    self.norm_power
                    if h.is_default(values[h.name])
                    else self.flipped_power[1]
                )
        return self.norm_power

    def _check_dimension(self, dimension: Any) -> None:
        """Raise unless it is a number, or, for matrices, a pair of numbers."""
        name = f"UPDATE_RULES[{self.name!r}]"
        several = isinstance(dimension, tuple | list)
        pair = several and len(dimension) == 2 and None not in map(_kind, dimension)
        if self.of_matrices and not pair:
            raise ValueError(
                f"{name} takes a whole matrix, so its dimension must be a pair, got "
                f"{dimension!r}; pass dimension=(rows, columns), the inputs and the "
                "outputs of a kernel."
            )
        if not self.of_matrices and several:
            raise ValueError(
                f"the dimension of {name} must be the number of entries of a weight "
                f"vector, got {dimension!r}; pass dimension=rows * columns where the "
                "vector is a whole matrix."
            )
        check_positive("dimension", dimension)

    def _values(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the value of every hyperparameter, and refuse any others."""
        values = {h.name: h.default for h in self.hyperparameters}
        for name in given:
            if name not in values:
                known = "learning_rate", "weight_decay", *values
                fix = nearest(name, known, f"leave {name} out.")
                raise TypeError(
                    f"UPDATE_RULES[{self.name!r}] has {', '.join(values)}, got {name}; "
                    f"{fix}"
                )
        return values | given
