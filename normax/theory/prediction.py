r"""The norm and the angle of scale-invariant weights over a whole run, and the inverse.

A linear step (`moments`) closes in three second moments of weights and memory,
$$\mathbb E\,\|w\|^2, \qquad \mathbb E\,\langle w, m\rangle, \qquad
\mathbb E\,\|m\|^2.$$
So a scan over three numbers a vector follows any schedule. Derivation and accuracy:
docs/theory/theory.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax._core.norms import at_least_float32
from normax.theory.moments import Averages, Coefficients, Moments, Now, Step

Schedule = Callable[[jax.Array], Any]


class Prediction(NamedTuple):
    """Result of `UpdateRule.predict`: what each step of a run starts from and does.

    Attributes:
      weight_norm: Norms of the weight vectors before the step, root mean squares, of
        shape (steps, ...).
      angular_update: Angles in radians by which the step turns them.
      effective_learning_rate: Learning rates over the power of the norm that the rule
        has, as of `UpdateRule.effective_learning_rate`.
    """

    weight_norm: jax.Array
    angular_update: jax.Array
    effective_learning_rate: jax.Array


def as_schedule(value: Any) -> Schedule:
    """Return a number as a schedule, and a schedule as it is."""
    return value if callable(value) else lambda count: value


class _State(NamedTuple):
    """The memory is m = along w + t, with t orthogonal to w."""

    norm2: jax.Array  # E |w|^2
    along: jax.Array
    tangent2: jax.Array  # E |t|^2
    past_rate: jax.Array
    averages: Averages


class _Map(NamedTuple):
    """A step in orthogonal vectors: w' and m' have parts along w, t, g and a rest."""

    weights: Coefficients
    memory: Coefficients
    rest2: Any

    def tangent2(self, state: _State, gradient2: jax.Array) -> jax.Array:
        """Return the mean square of the part of w' that is orthogonal to w."""
        _, moved, new = self.weights
        return moved**2 * state.tangent2 + new**2 * gradient2 + self.rest2

    def advance(
        self, state: _State, gradient2: jax.Array, eta: Any, averages: Averages
    ) -> _State:
        """Return the second moments of w' and m'."""
        squares = state.norm2, state.tangent2, gradient2
        (a, b, c), (f, g, h) = self.weights, self.memory

        def product(x: Coefficients, y: Coefficients) -> Any:
            return sum(p * q * z for p, q, z in zip(x, y, squares, strict=True))

        norm2 = product(self.weights, self.weights) + self.rest2
        # Lagrange's identity: |m'|^2 |w'|^2 - <w', m'>^2 without a difference of both.
        crossed = (
            (a * g - b * f) ** 2 * state.tangent2 + (a * h - c * f) ** 2 * gradient2
        ) * (state.norm2 / norm2)
        crossed += (b * h - c * g) ** 2 * gradient2 * (state.tangent2 / norm2)
        crossed += product(self.memory, self.memory) * (self.rest2 / norm2)
        along = product(self.weights, self.memory) / norm2
        return _State(norm2, along, crossed, eta, averages)


def _map(moments: Moments, step: Step, state: _State, eta: Any) -> _Map:
    """Return the step at a learning rate, with m replaced by its two parts."""
    u_w, u_m, u_g = step.direction
    f_w, f_m, f_g = step.memory
    if moments.holds_rates:
        moved, f_w, f_g = u_m, -eta * f_w, -eta * f_g
    else:
        moved = -eta * u_m
    return _Map(
        (1 - step.decay - eta * u_w + moved * state.along, moved, -eta * u_g),
        (f_w + f_m * state.along, f_m, f_g),
        eta**2 * step.rest2,
    )


def _rate_of_angle(state: _State, step: Step, gradient2: Any, angle: Any) -> jax.Array:
    r"""Return the rate at which a step turns w by an angle.

    The step is $\eta T$ across w and $-(\delta + \eta q)\|w\|$ along it, so
    $\tan\theta = \eta T / (\|w\| - \delta\|w\| - \eta q \|w\|)$.
    """
    u_w, u_m, u_g = step.direction
    unit = _Map((u_w, u_m, u_g), step.memory, step.rest2)
    tangent = jnp.sqrt(unit.tangent2(state, gradient2) / state.norm2)
    slope = jnp.tan(angle)
    return (1 - step.decay) * slope / (tangent + slope * (u_w + u_m * state.along))


class Run(NamedTuple):
    """What predictions share: the model of the gradient, and the rule."""

    moments: Moments
    hyperparameters: dict[str, Any]
    steps: int
    initial_norm: Any
    gradient_norm: Any
    dimension: Any

    def follow(
        self, weight_decay: Schedule, learning_rate: Schedule | None, angle: Any = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return norms, angles and rates of all steps, by the rate or by the angle."""
        sides, structure = jax.tree.flatten(self.dimension)
        norm, profile, *sides = at_least_float32(
            self.initial_norm, self.gradient_norm, *sides
        )
        shapes = (side.shape for side in sides)
        shape = jnp.broadcast_shapes(norm.shape, profile.shape[1:], *shapes)
        sides = [jnp.broadcast_to(side, shape) for side in sides]
        dimension = jax.tree.unflatten(structure, sides)
        norm2 = jnp.broadcast_to(norm**2, shape)
        profile = jnp.broadcast_to(profile, (self.steps, *profile.shape[1:]))

        def step(state, inputs):
            count, gradient_norm = inputs
            gradient2 = gradient_norm**2 / state.norm2
            now = Now(
                count + 1,
                jnp.asarray(weight_decay(count), norm2.dtype),
                state.norm2,
                state.along,
                state.tangent2,
                gradient2,
                dimension,
                state.past_rate,
            )
            averages, step = self.moments.step(
                state.averages, now, **self.hyperparameters
            )
            if learning_rate is None:
                eta = _rate_of_angle(state, step, gradient2, angle(count))
            else:
                eta = jnp.asarray(learning_rate(count), norm2.dtype)
            step = _map(self.moments, step, state, eta)
            tangent = jnp.sqrt(step.tangent2(state, gradient2) / state.norm2)
            turned = jnp.arctan2(tangent, step.weights[0])
            new = step.advance(state, gradient2, eta, averages)
            if self.moments.projects:
                along = new.along * jnp.sqrt(new.norm2)
                new = new._replace(norm2=jnp.ones(shape), along=along)
            new = jax.tree.map(
                lambda x: jnp.broadcast_to(x, shape).astype(norm2.dtype), new
            )
            return new, (jnp.sqrt(state.norm2), turned, jnp.broadcast_to(eta, shape))

        begin, zero = self.moments.begin(**self.hyperparameters), jnp.zeros(())
        start = jax.tree.map(
            lambda x: jnp.broadcast_to(x, shape).astype(norm2.dtype),
            _State(norm2, zero, zero, zero, begin),
        )
        counts = jnp.arange(self.steps, dtype=jnp.int32)  # as the counts of optax
        return jax.lax.scan(step, start, (counts, profile))[1]
