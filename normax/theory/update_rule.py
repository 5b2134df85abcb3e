"""What an update rule is: how to make it, its effective rate, where it settles."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
from normax._core.norms import at_least_float32
from normax.theory.equilibrium import Equilibrium, Theory, steps_to_equilibrium


class Hyperparameter(NamedTuple):
    """One keyword of the optax call that is an update rule."""

    name: str
    default: Any
    # A number must lie in [0, below). It is None for switches, types and functions.
    below: float | None = math.inf
    # True where the equilibrium is known for all values. `Theory.settle` then takes it.
    in_theory: bool = False

    def or_zero(self, value: Any) -> Any:
        """Return `value`, or 0 for a number that is None, as momentum may be."""
        return 0.0 if value is None and self.below is not None else value

    def check(self, value: Any) -> None:
        """Raise unless a number is in range, or not known yet."""
        if self.below is not None:
            check_range(self.name, value, low=0, below=self.below)

    def is_default(self, value: Any) -> bool:
        """Return whether `value` is known to do what the default does."""
        if isinstance(value, jax.core.Tracer):
            return False
        return bool(np.all(self.or_zero(value) == self.or_zero(self.default)))


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    r"""An update rule, its effective learning rate, and its equilibrium.

    Attributes:
      name: Key of the rule in `UPDATE_RULES`.
      norm_power: The exponent $p$ of $\eta_\mathrm{eff} = \eta / \|w\|^p$.
      theory: Where the rule's norm settles; None where it does not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> tx = normax.UPDATE_RULES["sgd"].make(0.5, weight_decay=0.1)
      >>> params = jnp.array([2.0])
      >>> tx.update(jnp.array([1.0]), tx.init(params), params)[0]
      Array([-0.6], dtype=float32)

    References:
      van Laarhoven, 2017, arXiv:1706.05350, sections 3.1, 4, 5 and Table 1.
      Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
    """

    name: str
    norm_power: int
    # The optax call that is the rule.
    optimizer: Callable[..., optax.GradientTransformation] = dataclasses.field(
        repr=False
    )
    theory: Theory | None = dataclasses.field(repr=False)
    # All keywords of the call but the learning rate and the weight decay.
    hyperparameters: tuple[Hyperparameter, ...] = dataclasses.field(repr=False)
    # True where the call takes the weight decay. Otherwise the gradient gets it.
    decays_itself: bool = dataclasses.field(default=False, repr=False)

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
        self, learning_rate: jax.typing.ArrayLike, weight_norm: PyTree
    ) -> PyTree:
        r"""Learning rate of the rule on weights of norm one.

        $$\eta_\mathrm{eff} = \eta / \|w\|^p$$

        With it, a step from $w / \|w\|$ arrives at the same function as the rule's step
        from scale-invariant weights $w$, for adaptive rules as $\epsilon \to 0$.

        Args:
          learning_rate: Learning rate $\eta$.
          weight_norm: Norms: a number, an array, or a pytree as of `weight_norm`.

        Returns:
          Effective learning rates, in the structure of `weight_norm`.

        Raises:
          ValueError: The learning rate is no number.

        Examples:
          >>> import normax
          >>> normax.UPDATE_RULES["momentum"].effective_learning_rate(0.1, 2.0)
          0.025
        """
        check_number("learning_rate", learning_rate)
        return jax.tree.map(
            lambda norm: learning_rate / norm**self.norm_power, weight_norm
        )

    def equilibrium_norm(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_decay: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike | None = None,
        dimension: jax.typing.ArrayLike | None = None,
        **hyperparameters: Any,
    ) -> jax.Array:
        r"""Norm at which the rule and weight decay hold a scale-invariant vector.

        $$\|w\|^4 = \frac{\eta G^2}{2\lambda\,(1-\rho)}, \qquad
        \|w\|^3 = \frac{\eta\sqrt d\,G}{2\lambda}, \qquad
        \|w\|^2 = \frac{\eta d}{2\lambda}$$

        to leading order in $\eta\lambda$, for SGD with any momentum; RMSProp and Adam;
        AdamW. The result is more precise. It assumes that gradients are noise, with
        entries large beside $\epsilon$. Derivation and limits: docs/theory/theory.md.

        Args:
          learning_rate: Learning rate $\eta$, positive.
          weight_decay: Weight decay $\lambda$; where it is 0, the norm is infinite.
          gradient_norm: $G = (\mathbb E\,\|\nabla L\|^2)^{1/2}$ of one weight vector
            at $\|w\| = 1$. May be None where the result does not depend on it.
          dimension: Number $d$ of entries of the weight vector; may be None likewise.
          **hyperparameters: Those of `make`, with its defaults.

        Returns:
          Norms, in the common shape of all arguments, in float32 or better.

        Raises:
          TypeError: The rule has no such hyperparameter.
          ValueError: The rule has no equilibrium, training would diverge, an argument
            is missing or out of range, or the theory does not know a hyperparameter.

        Examples:
          >>> import normax
          >>> rule = normax.UPDATE_RULES["sgd"]
          >>> print(f"{rule.equilibrium_norm(0.1, 1e-3, gradient_norm=2.0):.3f}")
          3.761
        """
        given = learning_rate, weight_decay, gradient_norm, dimension
        return self._settle(self._theory().norm_needs, given, hyperparameters).norm

    def equilibrium_rotation(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_decay: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike | None = None,
        dimension: jax.typing.ArrayLike | None = None,
        **hyperparameters: Any,
    ) -> jax.Array:
        r"""Angle by which the rule turns a scale-invariant vector that has settled.

        $$\cos\theta = 1 - \frac{\eta\lambda}{1+\rho}, \qquad
        \theta \approx \Big(2\eta\lambda\,\frac{1-b_1}{1+b_1}\Big)^{1/2}$$

        for momentum, exactly, and for AdamW. The arguments and errors are those of
        `equilibrium_norm`. Derivation and limits: docs/theory/theory.md.

        Returns:
          Angles in radians per step, root mean squares, in the common shape of
          all arguments, in float32 or better.

        Examples:
          >>> import normax
          >>> normax.UPDATE_RULES["adamw"].equilibrium_rotation(1e-3, 0.1).round(6)
          Array(0.003244, dtype=float32)
        """
        given = learning_rate, weight_decay, gradient_norm, dimension
        needs = self._theory().rotation_needs
        return self._settle(needs, given, hyperparameters).rotation

    def equilibrium_time(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_decay: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike | None = None,
        dimension: jax.typing.ArrayLike | None = None,
        *,
        initial_norm: jax.typing.ArrayLike,
        **hyperparameters: Any,
    ) -> jax.Array:
        r"""Steps until the norm is within 10% of `equilibrium_norm`.

        $$\frac{dx}{dt} = \kappa\,(x^{1-2p} - x^{3-p}) \qquad
        \text{(AdamW: } \kappa\,(x^{-1} - x)\text{)}$$

        is followed from `initial_norm`, with $x = \|w\| / \|w\|_\mathrm{eq}$. The other
        arguments are those of `equilibrium_norm`. Derivation: docs/theory/theory.md.

        Returns:
          Numbers of steps, not rounded, in the common shape of all arguments, in
          float32 or better; 0 where the start is within 10%.

        Examples:
          >>> import normax
          >>> rule = normax.UPDATE_RULES["adamw"]
          >>> rule.equilibrium_time(1e-3, 0.1, dimension=64, initial_norm=1.0).round()
          Array(11586., dtype=float32)
        """
        check_positive("initial_norm", initial_norm)
        theory = self._theory()
        given = learning_rate, weight_decay, gradient_norm, dimension
        settled = self._settle(theory.norm_needs, given, hyperparameters)
        (start,) = at_least_float32(initial_norm)
        start, norm, rate = jnp.broadcast_arrays(
            start, settled.norm, settled.decay_rate
        )
        return steps_to_equilibrium(theory, start / norm, rate)

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

    def _theory(self) -> Theory:
        if self.theory is None:
            raise ValueError(
                f"UPDATE_RULES[{self.name!r}] has no equilibrium: its norm and "
                "rotation fall for ever; choose another rule, such as 'rmsprop'."
            )
        return self.theory

    def _check_known(self, values: dict[str, Any]) -> None:
        for h in self.hyperparameters:
            if not h.in_theory and not h.is_default(values[h.name]):
                known = [h.name for h in self.hyperparameters if h.in_theory]
                raise ValueError(
                    f"the equilibrium of UPDATE_RULES[{self.name!r}] is not known for "
                    f"{h.name}={values[h.name]}; leave {h.name} at {h.default}; the "
                    f"theory knows {', '.join(known) or 'no hyperparameter'}."
                )

    def _settle(
        self,
        needs: tuple[str, ...],
        given: tuple[jax.typing.ArrayLike | None, ...],
        hyperparameters: dict[str, Any],
    ) -> Equilibrium:
        """Return the equilibrium for checked arguments, which broadcast."""
        values = self._values(hyperparameters)
        self._check_known(values)
        names = "learning_rate", "weight_decay", "gradient_norm", "dimension"
        numbers: dict[str, Any] = dict(zip(names, given, strict=True))
        for name in needs:
            if numbers[name] is None:
                raise ValueError(
                    f"the equilibrium of UPDATE_RULES[{self.name!r}] depends on the "
                    f"{name}, but it is None; pass {name}."
                )
        # The result does not depend on what may be None, so any number will do.
        for name in ("gradient_norm", "dimension"):
            numbers[name] = 1.0 if numbers[name] is None else numbers[name]
        for name in ("learning_rate", "gradient_norm", "dimension"):
            check_positive(name, numbers[name])
        check_range("weight_decay", numbers["weight_decay"], low=0)
        options = {}
        for h in self.hyperparameters:
            if h.in_theory and h.below is None:
                options[h.name] = values[h.name]
            elif h.in_theory:
                numbers[h.name] = h.or_zero(values[h.name])
                h.check(numbers[h.name])
        arrays = jnp.broadcast_arrays(*at_least_float32(*numbers.values()))
        numbers = dict(zip(numbers, arrays, strict=True))
        return self._theory().settle(**numbers, **options)
