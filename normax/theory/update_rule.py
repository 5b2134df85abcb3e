"""What an update rule is: how to make it, its effective rate, where it settles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from normax._core.checks import check_positive, check_range
from normax._core.norms import at_least_float32
from normax.theory.equilibrium import Equilibrium, Theory, steps_to_equilibrium
from normax.theory.predicted_rule import PredictedRule
from normax.theory.recurrence import Dimension


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRule(PredictedRule):
    r"""An update rule, its effective learning rate, and its equilibrium.

    Attributes:
      name: Key of the rule in `UPDATE_RULES`.
      norm_power: The exponent $p$ of $\eta_\mathrm{eff} = \eta / \|w\|^p$, where the
        hyperparameters are the defaults.
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

    theory: Theory | None = dataclasses.field(repr=False)

    def equilibrium_norm(
        self,
        learning_rate: jax.typing.ArrayLike,
        weight_decay: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike | None = None,
        dimension: Dimension = None,
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
            For Muon the pair (rows, columns) of a matrix, the inputs and outputs of a
            kernel; its norm is that of the whole matrix.
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
        dimension: Dimension = None,
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
        dimension: Dimension = None,
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

    def _theory(self) -> Theory:
        if self.theory is None:
            raise ValueError(
                f"UPDATE_RULES[{self.name!r}] has no equilibrium: its norm and "
                "rotation fall for ever; choose another rule, such as 'rmsprop'."
            )
        return self.theory

    def _check_known(self, values: dict[str, Any]) -> None:
        for h in self.hyperparameters:
            if not (h.in_theory or h.aside or h.is_default(values[h.name])):
                known = [h.name for h in self.hyperparameters if h.in_theory]
                raise ValueError(
                    f"the equilibrium of UPDATE_RULES[{self.name!r}] is not known for "
                    f"{h.name}={values[h.name]}; leave {h.name} at {h.default}; the "
                    f"theory knows {', '.join(known) or 'no hyperparameter'}."
                )

    def _settle(
        self,
        needs: tuple[str, ...],
        given: tuple[Dimension, ...],
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
        for name in ("learning_rate", "gradient_norm"):
            check_positive(name, numbers[name])
        self._check_dimension(numbers["dimension"])
        check_range("weight_decay", numbers["weight_decay"], low=0)
        options = {}
        for h in self.hyperparameters:
            if h.in_theory and h.below is None:
                options[h.name] = values[h.name]
                h.check(options[h.name])
            elif h.in_theory:
                numbers[h.name] = h.or_zero(values[h.name])
                h.check(numbers[h.name])
        flat, structure = jax.tree.flatten(numbers)
        arrays = jnp.broadcast_arrays(*at_least_float32(*flat))
        numbers = jax.tree.unflatten(structure, arrays)
        return self._theory().settle(**numbers, **options)
