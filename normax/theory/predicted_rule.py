"""Update rules whose runs are predicted: norm and angle by the rates, and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax._core.checks import (
    check_count,
    check_learning_rate,
    check_positive,
    check_range,
)
from normax.theory.moments import Moments
from normax.theory.prediction import Prediction, Run, as_schedule
from normax.theory.recurrence import Dimension, Recurrence


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedRule(Recurrence):
    """An update rule with what a step does to second moments."""

    moments: Moments = dataclasses.field(repr=False)

    def predict(
        self,
        learning_rate: optax.ScalarOrSchedule,
        weight_decay: optax.ScalarOrSchedule,
        *,
        steps: int,
        initial_norm: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike = 1.0,
        dimension: Dimension = None,
        **hyperparameters: Any,
    ) -> Prediction:
        r"""Predict norm and angle of a scale-invariant vector over a whole run.

        $$R = \mathbb E\,\|w\|^2, \qquad C = \mathbb E\,\langle w, m\rangle, \qquad
        M = \mathbb E\,\|m\|^2$$

        are followed step by step, with $m$ the memory of the rule. As for the
        equilibrium, the gradient is noise of norm $G_t/\|w_t\|$. Warm-up, decaying
        rates, bias correction and $\epsilon$ count. Derivation and accuracy:
        docs/theory/theory.md.

        Args:
          learning_rate: Learning rate $\eta_t$: a number or a schedule.
          weight_decay: Weight decay $\lambda_t$: a number or a schedule.
          steps: Number of steps.
          initial_norm: Norms of the vectors at the start, of any shape.
          gradient_norm: $G = (\mathbb E\,\|\nabla L\|^2)^{1/2}$ at $\|w\| = 1$: a
            number, or an array of shape (steps,) or (steps, ...) of a run. Where it is
            0 all along, as for units that get no gradient, weights only decay.
          dimension: Number $d$ of entries of a vector. May be None where the result
            does not depend on it. For Muon the pair (rows, columns) of a matrix, the
            inputs and outputs of a kernel; its norm is that of the whole matrix.
          **hyperparameters: Those of `make`, with its defaults.

        Returns:
          A `Prediction` of arrays of shape (steps, ...), in float32 or better.

        Raises:
          TypeError: The rule has no such hyperparameter.
          ValueError: An argument is missing, out of range or of another shape; or a
            gradient norm is 0 and the rule divides its decay too, as Adam does.

        Examples:
          >>> import normax, optax
          >>> rate = optax.cosine_decay_schedule(1e-3, 5000)
          >>> run = normax.UPDATE_RULES["adamw"].predict(
          ...     rate, 0.5, steps=5000, initial_norm=1.0, dimension=512
          ... )
          >>> [f"{norm:.2f}" for norm in run.weight_norm[::2000]]
          ['1.00', '0.76', '0.64']

        References:
          Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
        """
        check_learning_rate(learning_rate)
        run = self._run(
            weight_decay, steps, initial_norm, gradient_norm, dimension, hyperparameters
        )
        norm, angle, eta = run.follow(
            as_schedule(weight_decay), as_schedule(learning_rate)
        )
        rate = self.effective_learning_rate(eta, norm, **hyperparameters)
        return Prediction(norm, angle, rate)

    def schedule_for_angle(
        self,
        angle: optax.ScalarOrSchedule,
        weight_decay: optax.ScalarOrSchedule,
        *,
        steps: int,
        initial_norm: jax.typing.ArrayLike,
        gradient_norm: jax.typing.ArrayLike = 1.0,
        dimension: Dimension = None,
        **hyperparameters: Any,
    ) -> optax.Schedule:
        r"""Learning rates under which a scale-invariant vector turns by given angles.

        $$\eta_t = \frac{\|w_t\| \tan\theta_t}{T_t + Q_t \tan\theta_t}$$

        where $T$ and $Q$ are the tangential and the radial length of the rule's step at
        rate one, in the model of `predict`. The other arguments are those of `predict`.

        Args:
          angle: Angle $\theta_t$ in radians, below $\pi/2$: a number or a schedule.
          weight_decay: Weight decay $\lambda_t$: a number or a schedule.
          steps: Number of steps.
          initial_norm: Norm of the vector at the start.
          gradient_norm: A number, or an array of shape (steps,).
          dimension: Number of entries of the vector; for Muon, (rows, columns).
          **hyperparameters: Those of `make`, with its defaults.

        Returns:
          A schedule of the step. Beyond the last step it keeps the last rate.

        Raises:
          ValueError: As `predict`; or the rule's memory holds past rates, as that of
            RMSProp does where it is centered or has momentum.

        Examples:
          >>> import normax
          >>> rule, run = normax.UPDATE_RULES["adamw"], dict(
          ...     weight_decay=0.1, steps=100, initial_norm=1.0, dimension=64
          ... )
          >>> rate = rule.schedule_for_angle(0.01, **run)
          >>> rule.predict(rate, **run).angular_update[::33].round(5)
          Array([0.01, 0.01, 0.01, 0.01], dtype=float32)

        References:
          Kosson, Messmer, Jaggi, Rotational Equilibrium, 2024, arXiv:2305.17212.
        """
        if not callable(angle):
            check_positive("angle", angle)
            check_range("angle", angle, low=0, below=math.pi / 2)
        if self.moments.decays_apart and not callable(weight_decay):
            check_range("weight_decay", weight_decay, low=0, below=1)
        self._refuse_zero(gradient_norm, "no learning rate turns a vector then")
        run = self._run(
            weight_decay, steps, initial_norm, gradient_norm, dimension, hyperparameters
        )
        values = self._values(hyperparameters)
        if self.moments.holds_rates and (
            values["momentum"] is not None or values.get("centered")
        ):
            raise ValueError(
                f"the memory of UPDATE_RULES[{self.name!r}] holds past learning rates, "
                "so that no rate gives the angle alone; leave momentum at None, and "
                "centered at False where it has that."
            )
        rates = run.follow(as_schedule(weight_decay), None, as_schedule(angle))[2]
        if rates.ndim > 1:
            raise ValueError(
                "one schedule is for one vector, but the arguments have shape "
                f"{rates.shape[1:]}; pass numbers, or map with jax.vmap."
            )
        return lambda count: rates[jnp.clip(count, 0, steps - 1)]

    def _refuse_zero(self, gradient_norm: jax.typing.ArrayLike, reason: str) -> None:
        known = not isinstance(gradient_norm, jax.core.Tracer)
        if known and np.any(np.asarray(gradient_norm) == 0):
            raise ValueError(
                f"gradient_norm must be positive for UPDATE_RULES[{self.name!r}], got "
                f"0: {reason}; leave out the vectors that get no gradient."
            )

    def _run(
        self, weight_decay, steps, initial_norm, gradient_norm, dimension, given
    ) -> Run:
        """Return the checked model of a run."""
        if not callable(weight_decay):
            check_range("weight_decay", weight_decay, low=0)
        steps = check_count("steps", steps, "pass the number of steps of the run")
        check_positive("initial_norm", initial_norm)
        check_range("gradient_norm", gradient_norm, low=0)
        if self.moments.divides_decay:
            reason = "its decay is divided entry by entry, and turns a vector then"
            self._refuse_zero(gradient_norm, reason)
        if jnp.ndim(gradient_norm) and jnp.shape(gradient_norm)[0] != steps:
            raise ValueError(
                f"gradient_norm must be a number or have shape (steps, ...), and steps "
                f"is {steps}, got shape {jnp.shape(gradient_norm)}; pass the norm of "
                "each step."
            )
        values = self._values(given)
        known = self.moments.hyperparameters
        for h in self.hyperparameters:
            h.check(values[h.name])
            if not (h.aside or h.name in known or h.is_default(values[h.name])):
                raise ValueError(
                    f"the prediction of UPDATE_RULES[{self.name!r}] is not known for "
                    f"{h.name}={values[h.name]}; leave {h.name} at {h.default}."
                )
        if dimension is None and self.moments.needs_dimension:
            fix = "the number of entries of a vector"
            if self.of_matrices:
                fix = "dimension=(rows, columns)"
            raise ValueError(
                f"the prediction of UPDATE_RULES[{self.name!r}] depends on the "
                f"dimension, but it is None; pass {fix}."
            )
        dimension = 1.0 if dimension is None else dimension
        self._check_dimension(dimension)
        numbers = {
            h.name: h.or_zero(values[h.name])
            for h in self.hyperparameters
            if h.name in known
        }
        return Run(self.moments, numbers, steps, initial_norm, gradient_norm, dimension)
